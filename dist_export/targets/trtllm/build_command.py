"""The ``trtllm-build`` command for an export: with the options without which it would fail, or build too much."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_PAGED_WITH = ("FP8", "W4A8_AWQ", "NVFP4", "MIXED_PRECISION")


def fitting_options(config: Mapping[str, Any]) -> dict[str, str]:
    """Options that follow from config.json, name -> value as on the command line.

    ``max_seq_len``: left out, it becomes the positions times the factor of the rotary scaling, in 0.14 also where
    ``max_position_embeddings`` counts it already (llama3). ``max_num_tokens`` is never more than all sequences have.
    Paged context attention, on by default from 0.19, refuses INT8 caches, and FP8 ones beside weights that are not FP8
    (tensorrt_llm/builder.py, `_init_max_seq_len` and `build`).
    """
    options = {}
    positions, scaling = config.get("max_position_embeddings"), config.get("rotary_scaling") or {}
    if isinstance(positions, int):
        factor = float(scaling.get("factor", 1.0)) if scaling.get("type") == "linear" else 1.0
        options["max_seq_len"] = str(int(positions * factor))
    quantization = config.get("quantization") or {}
    algorithm, cache = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    if cache == "INT8" or (cache == "FP8" and algorithm not in _PAGED_WITH):
        options["use_paged_context_fmha"] = "disable"
    if algorithm is None:
        options["gemm_plugin"] = "auto"
    world_size = config["mapping"]["world_size"]
    if world_size > 1:
        options["workers"] = str(world_size)
    return options


def build_command(config: Mapping[str, Any], *, checkpoint: str, engines: str = "ENGINES") -> str:
    """The command as text. `checkpoint` may be a placeholder in braces."""
    words: Sequence[str] = [word for name, value in fitting_options(config).items() for word in (f"--{name}", value)]
    return f"trtllm-build --checkpoint_dir {checkpoint} --output_dir {engines} {shlex.join(words)}".rstrip()
