"""Time the converter for models on a GPU against Megatron-Core's class of the same name, on one GPU and one state dict.

    python tests/benchmarks/against_distributed_converter.py [--device cuda] [--layers 16] [--hidden 2048]

Both get the same state dict of a Llama-style model on the device, of one rank, and leave TensorRT-LLM's tensors in
host memory; their bytes are compared. What of tensorrt_llm Megatron-Core's imports is one helper of one line, which
stands in here. Every figure is of `convert` alone, the device idle before and after: of the first call, in which memory
is taken (and theirs pinned), and the median of the others. With --device cpu the memory that
theirs pins is ordinary memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

State = dict[str, torch.Tensor]
HEADS, GROUPS, VOCAB = 32, 8, 32000


def state_dict(num_layers: int, hidden: int, device: str) -> State:
    """A model's tensors as Megatron-Core names them, with random values."""
    ffn, head = hidden * 7 // 2, hidden // HEADS
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (VOCAB, hidden)}
    for layer in range(num_layers):
        name = f"decoder.layers.{layer}."
        shapes |= {
            name + "self_attention.linear_qkv.layer_norm_weight": (hidden,),
            name + "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * head, hidden),
            name + "self_attention.linear_proj.weight": (hidden, hidden),
            name + "mlp.linear_fc1.layer_norm_weight": (hidden,),
            name + "mlp.linear_fc1.weight": (2 * ffn, hidden),
            name + "mlp.linear_fc2.weight": (hidden, ffn),
        }
    shapes |= {"decoder.final_layernorm.weight": (hidden,), "output_layer.weight": (VOCAB, hidden)}
    torch.manual_seed(1)
    return {name: torch.randn(shape, device=device).to(torch.bfloat16) for name, shape in shapes.items()}


def converters(num_layers: int, hidden: int) -> dict[str, Callable[[State], State]]:
    """Name -> conversion of a state dict. Begins the process group of this one process."""
    helpers = types.ModuleType("tensorrt_llm._utils")
    helpers.str_dtype_to_torch = lambda name: getattr(torch, name)  # type: ignore[attr-defined]
    sys.modules["tensorrt_llm"], sys.modules["tensorrt_llm._utils"] = types.ModuleType("tensorrt_llm"), helpers
    from megatron.core import parallel_state
    from megatron.core.export.data_type import DataType
    from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
    from megatron.core.export.trtllm.trtllm_weights_converter import (
        distributed_trtllm_model_weights_converter as theirs,
    )
    from megatron.core.transformer import TransformerConfig

    from dist_export.megatron_export import DistributedTRTLLMModelWeightsConverter

    theirs.tqdm = lambda layers, **_: layers  # no progress bar: neither is timed with one
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=num_layers, hidden_size=hidden, num_attention_heads=HEADS, num_query_groups=GROUPS,
        ffn_hidden_size=hidden * 7 // 2, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        normalization="RMSNorm", add_bias_linear=False, bf16=True, params_dtype=torch.bfloat16,
    )  # fmt: skip

    def convert(kind: type, state: State, dtype: object, conversion: dict[str, object]) -> State:
        converter = kind(config, dtype, activation="swiglu")
        converter.convert(dict(state), conversion, VOCAB)
        found: State = converter.trtllm_model_weights
        return found

    return {
        "dist_export": lambda state: convert(DistributedTRTLLMModelWeightsConverter, state, "bfloat16", {}),
        "Megatron-Core": lambda state: convert(
            theirs.DistributedTRTLLMModelWeightsConverter, state, DataType.bfloat16, DEFAULT_CONVERSION_DICT
        ),
    }


def without_pinning(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.empty` for a machine that cannot pin memory."""
    return lambda *sizes, pin_memory=False, **options: empty(*sizes, **options)


def wait(device: str) -> None:
    """Until the device has done everything."""
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.device == "cpu":
        torch.empty = without_pinning(torch.empty)
    state = state_dict(options.layers, options.hidden, options.device)
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    times: dict[str, list[float]] = {}
    results: dict[str, State] = {}
    programs = converters(options.layers, options.hidden)
    for _ in range(options.runs + 1):
        for name, program in programs.items():
            wait(options.device)
            begun = time.monotonic()
            results[name] = program(state)
            wait(options.device)
            times.setdefault(name, []).append(time.monotonic() - begun)
    ours, theirs = results.values()
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name].cpu(), theirs[name].cpu())]
    assert not different, different
    print("| converter | first s | s | GB/s | against dist_export |\n|---|---|---|---|---|")
    first = statistics.median(times["dist_export"][1:])
    for name, found in times.items():
        median = statistics.median(found[1:])  # the first run warms allocators
        print(f"| {name} | {found[0]:.3f} | {median:.3f} | {num_bytes / median / 1e9:.1f} | {median / first:.2f} |")


if __name__ == "__main__":
    main()
