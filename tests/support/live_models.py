"""A real Megatron model in memory on several gloo ranks: saved as a checkpoint, and converted live in several ways.

    python tests/support/live_models.py OUT [options of launch/make_checkpoint.py] --trial NAME …

Writes the checkpoint to OUT, and per trial and target rank OUT/live/NAME/rank{R}.safetensors and config.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "launch"), str(REPOSITORY)]

Weights = tuple[list[dict[str, Any]], list[Any]]


def main() -> None:
    import make_checkpoint
    import megatron_on_cpu

    megatron_on_cpu.hide_gpus()
    import torch
    from megatron.core.models.gpt import GPTModel  # noqa: F401  imported before the fork
    from torch.multiprocessing.spawn import start_processes

    parser = make_checkpoint.build_parser()
    parser.add_argument("--trial", nargs="+", default=["plain"], choices=sorted(TRIALS))
    parser.add_argument("--target", type=int, nargs=2, default=(1, 1), help="tp and pp where a trial takes others")
    options = parser.parse_args()
    make_checkpoint.resolve(options)
    torch.set_num_threads(1)
    count = megatron_on_cpu.num_ranks(options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, f"file://{folder}/rendezvous", options)
        start_processes(_rank, arguments, count, start_method="fork")


def _rank(rank: int, count: int, rendezvous: str, options: argparse.Namespace) -> None:
    import megatron_on_cpu
    import portable_weights
    import save_formats
    import torch

    style = megatron_on_cpu.STYLES[options.style]
    megatron_on_cpu.substitute_cuda()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
    megatron_on_cpu.start_model_parallel(options)
    chunks = megatron_on_cpu.build_chunks(options, style)
    centred = style.zero_centered_gamma
    portable_weights.fill_chunks(chunks, seed=options.seed, vocab=options.vocab, zero_centered_gamma=centred)
    for chunk in chunks:  # the local norm cannot compute it, so it was built without
        chunk.config.layernorm_zero_centered_gamma = centred
    save_formats.save(chunks, options)
    for name in options.trial:
        weights, configs = TRIALS[name](chunks, options, style)
        _write(options.out / "live" / name, weights, configs)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _write(folder: Path, weights: list[dict[str, Any]], configs: list[Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for tensors, config in zip(weights, configs, strict=True):
        plain = {name: each.contiguous().clone() for name, each in tensors.items()}
        save_file(plain, folder / f"rank{config.rank}.safetensors")
        if config.rank == 0:
            (folder / "config.json").write_text(json.dumps(config.values))


def _helper(chunks: list[Any], options: argparse.Namespace, style: Any) -> Any:
    from dist_export.megatron_export import TRTLLMHelper

    model = chunks[0]
    types = {"llama": "llama", "gpt": "gpt", "nemotron": "gptnext", "mixtral": "mixtral"}
    return TRTLLMHelper(
        transformer_config=model.config,
        model_type=types[options.style],
        position_embedding_type=model.position_embedding_type,
        max_position_embeddings=options.seq,
        rotary_percentage=style.rotary_percent,
        rotary_base=options.rotary_base,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
    )


def _state(chunks: list[Any]) -> Any:
    return chunks[0].state_dict() if len(chunks) == 1 else [chunk.state_dict() for chunk in chunks]


def _convert(chunks: list[Any], options: argparse.Namespace, style: Any, state: Any, target: Any = None) -> Weights:
    return _helper(chunks, options, style).get_trtllm_pretrained_config_and_model_weights(
        model_state_dict=state,
        dtype=options.dtype,
        export_config=target,
        on_device_distributed_conversion=True,
        vocab_size=options.vocab,
        gpus_per_node=8,
    )


def _plain(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    """As Megatron-Core's distributed form: each rank its own tp and pp rank."""
    return _convert(chunks, options, style, _state(chunks))


def _sharded_state(chunks: list[Any]) -> Any:
    from megatron.core import parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]


def _sharded(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    return _convert(chunks, options, style, _sharded_state(chunks))


def _other_layout(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    from dist_export.megatron_export import ExportConfig

    target = ExportConfig(*options.target, use_parallel_embedding=True)
    return _convert(chunks, options, style, _state(chunks), target)


def _small_rounds(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    """Many rounds of a few kilobytes each, and the bound on what one receives."""
    from dist_export.live import run

    kept, run.ROUND_BYTES = run.ROUND_BYTES, 16 << 10
    most: list[int] = []
    tensors = run.LiveExport.tensors

    def watched(self: Any, files: Any) -> Any:
        self.round_bytes = 16 << 10
        result = tensors(self, files)
        most.append(self.most_bytes_received)
        return result

    run.LiveExport.tensors = watched  # type: ignore[method-assign]
    try:
        found = _other_layout(chunks, options, style)
    finally:
        run.ROUND_BYTES, run.LiveExport.tensors = kept, tensors  # type: ignore[method-assign]
    folder = options.out / "live" / "small_rounds"
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    (folder / f"most{torch.distributed.get_rank()}").write_text(str(most[0]))
    return found


def _converter(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    """The converter class alone, with a state dict under names of its own."""
    from dist_export.megatron_export import DistributedTRTLLMModelWeightsConverter
    from dist_export.megatron_export.values import RankConfig

    converter = DistributedTRTLLMModelWeightsConverter(chunks[0].config, options.dtype)
    own = {name.replace("self_attention.linear_proj", "attention.out"): v for name, v in chunks[0].state_dict().items()}
    kinds = ("weight", "bias")
    conversion = {f"decoder.layers.attention.out.{k}": f"transformer.layers.attention.dense.{k}" for k in kinds}
    converter.convert(own, conversion, options.vocab)
    rank = converter.pp_rank * converter.inference_tp_size + converter.tp_rank
    return [converter.trtllm_model_weights], [RankConfig({}, rank)]


def _single(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    """The whole model in one process."""
    from dist_export.megatron_export import ExportConfig

    return _helper(chunks, options, style).get_trtllm_pretrained_config_and_model_weights(
        model_state_dict=_state(chunks),
        dtype=options.dtype,
        export_config=ExportConfig(*options.target, use_parallel_embedding=True),
        vocab_size=options.vocab,
        gpus_per_node=8,
    )


def _fp8_state(chunks: list[Any]) -> Any:
    """The state dict with layer states as TransformerEngine 1 saves them: scale 4 of every linear's input."""
    import io

    import torch

    def saved() -> Any:
        scales = torch.tensor([4.0, 1.0, 1.0])
        state = {"scale_fwd": scales, "scale_inv_fwd": 1 / scales, "amax_history_fwd": torch.full((4, 3), 2.0)}
        buffer = io.BytesIO()
        torch.save({**state, "extra_fp8_variables": {"num_gemms": 1}}, buffer)
        return buffer

    state = chunks[0].state_dict()
    modules = [name.removesuffix(".weight") for name in state if ".linear_" in name and name.endswith(".weight")]
    return state | {f"{module}._extra_state": saved() for module in modules}


def _fp8(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    """FP8 over ranks; in one process, the whole model for the layout of `--target`."""
    import torch

    from dist_export.megatron_export import ExportConfig

    many = torch.distributed.get_world_size() > 1
    return _helper(chunks, options, style).get_trtllm_pretrained_config_and_model_weights(
        model_state_dict=_fp8_state(chunks),
        dtype=options.dtype,
        export_config=None if many else ExportConfig(*options.target, use_parallel_embedding=True),
        on_device_distributed_conversion=many,
        vocab_size=options.vocab,
        gpus_per_node=8,
        fp8_quantized=True,
        fp8_kvcache=True,
        kv_cache_scale=1.5,
    )


def _fp8_scales(chunks: list[Any], options: argparse.Namespace, style: Any) -> Weights:
    """The converter with scales under TensorRT-LLM's names, layers numbered within the rank."""
    from dist_export.megatron_export import DistributedTRTLLMModelWeightsConverter
    from dist_export.megatron_export.values import RankConfig

    linears = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    layers = options.layers // options.pp
    scale = {"trt_llm_scale": 0.25, "weight_multiplier": 4.0}
    names = [f"transformer.layers.{layer}.{linear}" for layer in range(layers) for linear in linears]
    scales = {f"{name}.activation_scaling_factor": scale for name in names}
    converter = DistributedTRTLLMModelWeightsConverter(chunks[0].config, options.dtype, scales=scales)
    converter.convert(chunks[0].state_dict(), {}, options.vocab)
    rank = converter.pp_rank * converter.inference_tp_size + converter.tp_rank
    return [converter.trtllm_model_weights], [RankConfig({}, rank)]


TRIALS: dict[str, Callable[[list[Any], argparse.Namespace, Any], Weights]] = {
    "plain": _plain,
    "sharded": _sharded,
    "other_layout": _other_layout,
    "small_rounds": _small_rounds,
    "converter": _converter,
    "single": _single,
    "fp8": _fp8,
    "fp8_scales": _fp8_scales,
}

if __name__ == "__main__":
    main()
