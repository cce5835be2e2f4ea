"""Two gloo ranks with half a model each take all of it in buckets; every rank prints what its process grew by.

    python tests/support/live_peak.py BUCKET_BYTES

A line of JSON per rank: bytes of the model, of the largest bucket, and how much the resident size grew at its peak.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

LAYERS, HIDDEN, FFN, VOCABULARY = 12, 512, 2048, 4096


def main(bucket_bytes: int) -> None:
    import megatron.core.parallel_state  # noqa: F401  imported before the fork
    import torch
    from torch.multiprocessing.spawn import start_processes

    import dist_export.live  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (f"file://{folder}/rendezvous", bucket_bytes), 2, start_method="fork")


def _rank(rank: int, rendezvous: str, bucket_bytes: int) -> None:
    import torch
    from megatron.core import parallel_state

    from dist_export.live import buckets
    from dist_export.targets.huggingface.target import HuggingFaceOptions

    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(2, 1)
    fields = {"position_embedding_type": "rope", "max_position_embeddings": 64,
              "share_embeddings_and_output_weights": False}  # fmt: skip
    found = buckets(_state(), HuggingFaceOptions(), bucket_bytes=bucket_bytes, transformer_config=_configuration(),
                    model_fields=fields)  # fmt: skip
    names, largest, total, first, peak_before = 0, 0, 0, True, 0
    for bucket in found:
        size = sum(tensor.nbytes for _, tensor in bucket)
        names, largest, total = names + len(bucket), max(largest, size), total + size
        del bucket
        if first:  # gloo's connections and the threads' buffers are there now
            first, peak_before = False, _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    grown = _resident("VmHWM") - peak_before
    line = json.dumps({"total": total, "largest": largest, "names": names, "grown": grown})
    os.write(1, f"{line}\n".encode())  # in one piece: two ranks share the pipe
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _state() -> dict[str, Any]:
    import torch

    def weight(*shape: int) -> Any:
        return torch.ones(shape, dtype=torch.bfloat16)

    state = {"embedding.word_embeddings.weight": weight(VOCABULARY // 2, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        state |= {
            prefix + "self_attention.linear_qkv.layer_norm_weight": weight(HIDDEN),
            prefix + "self_attention.linear_qkv.weight": weight(3 * HIDDEN // 2, HIDDEN),
            prefix + "self_attention.linear_proj.weight": weight(HIDDEN, HIDDEN // 2),
            prefix + "mlp.linear_fc1.layer_norm_weight": weight(HIDDEN),
            prefix + "mlp.linear_fc1.weight": weight(FFN, HIDDEN),
            prefix + "mlp.linear_fc2.weight": weight(HIDDEN, FFN // 2),
        }
    return {
        **state,
        "decoder.final_layernorm.weight": weight(HIDDEN),
        "output_layer.weight": weight(VOCABULARY // 2, HIDDEN),
    }


def _configuration() -> Any:
    import torch

    fields: dict[str, Any] = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 8,
        "num_query_groups": 8, "kv_channels": HIDDEN // 8, "normalization": "RMSNorm", "layernorm_epsilon": 1e-5,
        "gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "add_bias_linear": False,
        "params_dtype": torch.bfloat16,
    }  # fmt: skip
    return dataclasses.make_dataclass("Configuration", fields)(**fields)


def _resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
