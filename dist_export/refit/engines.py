"""What to do with the engines of a refitted export.

``trtllm-refit`` loads the whole checkpoint and demands every name that the engine can refit. Source:
tensorrt_llm/commands/refit.py, which is there from 0.11 to 1.2; one run does all ranks' engines.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_export.errors import ExportError

_FP8_PLUGINS = ("gemm_plugin", "low_latency_gemm_plugin", "low_latency_gemm_swiglu_plugin", "gemm_swiglu_plugin")
"""Set to ``fp8``, they take products of scales as constants (quantization/layers.py, FP8Linear; layers/mlp.py)."""
_CONSTANT_SCALES = "scales have changed, and it keeps them as constants, which a refit does not reach"


def engine_lines(
    config: Mapping[str, Any], checkpoint: Path, engines: Path | None, *, scales_changed: bool
) -> list[str]:
    """Lines for people: the command, and when it will not do. `config` is the export's config.json.

    Raises `ExportError` for a folder that has no engines.
    """
    why = None if engines is None else _not_refittable(engines, config, scales_changed=scales_changed)
    if why is not None:
        return [f"note: engines: {why}; build them anew"]
    old = engines if engines is not None else Path("ENGINES")
    words = ["--engine_dir", str(old), "--checkpoint_dir", str(checkpoint), "--output_dir", f"{old}-refitted"]
    lines = [f"next: trtllm-refit {shlex.join(words)}"]
    if engines is None:
        lines.append("note: that takes engines built with `dist-export engine … --refit` or `--strip_plan`, no others")
        if scales_changed and "FP8" in str((config.get("quantization") or {}).get("quant_algo")):
            lines.append(f"note: and none built with an FP8 GEMM plugin: {_CONSTANT_SCALES}")
    return lines


def check_engines(engines: Path) -> None:
    """Raise `ExportError` for a folder that has no engines; called before the work."""
    _read(engines)


def _not_refittable(engines: Path, config: Mapping[str, Any], *, scales_changed: bool) -> str | None:
    """Why ``trtllm-refit`` cannot bring engines to the export's weights; None when nothing speaks against it."""
    found = _read(engines)
    built, model = found.get("build_config") or {}, found.get("pretrained_config") or {}
    for key in ("architecture", "dtype", "mapping", "quantization"):
        old, new = model.get(key), config.get(key)
        if key == "mapping" and isinstance(old, dict) and isinstance(new, dict):
            old, new = ([each.get(size) for size in ("world_size", "tp_size", "pp_size")] for each in (old, new))
        if key == "quantization" and isinstance(old, dict) and isinstance(new, dict):
            old, new = ([each.get(size) for size in ("quant_algo", "kv_cache_quant_algo")] for each in (old, new))
        if old is not None and old != new:
            return f"those in {engines} are of another model ({key} is {old}, of the export {new})"
    plugins = built.get("plugin_config") or {}
    fp8 = [name for name in _FP8_PLUGINS if plugins.get(name) == "fp8"]
    if fp8 and scales_changed:
        return f"those in {engines} were built with {fp8[0]} fp8: {_CONSTANT_SCALES}"
    if plugins.get("manage_weights"):
        return f"those in {engines} were built with fast_build, whose weights lie beside the engine"
    if not (built.get("use_refit") or built.get("use_strip_plan")):
        return f"those in {engines} were built without `--refit` (or `--strip_plan`)"
    return None


def _read(engines: Path) -> dict[str, Any]:
    path = engines / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"--engines {engines}: {path.name} cannot be read: {error}") from error
    if not isinstance(found, dict) or "build_config" not in found:
        raise ExportError(f"--engines {engines}: holds no engines (config.json has no build_config)")
    return found
