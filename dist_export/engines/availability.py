"""Whether engines can be built here, found out without importing TensorRT-LLM or torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.targets.trtllm.releases import RELEASES

_IMAGE = "build in TensorRT-LLM's release image (docker/README.md)"
_HF = "export a Hugging Face folder instead, which TensorRT-LLM 1.3 and other servers load (--target hf)"
_QUERY_WITHIN_S = 60.0
_CAPABILITIES: Mapping[str, tuple[tuple[int, int], str]] = {
    "FP8": ((8, 9), "Ada, Hopper or newer"),
    "FP8_PER_CHANNEL_PER_TOKEN": ((8, 9), "Ada, Hopper or newer"),
    "W4A8_AWQ": ((8, 9), "Ada, Hopper or newer"),
    "NVFP4": ((10, 0), "Blackwell or newer"),
    "bfloat16": ((8, 0), "Ampere or newer"),
}
"""Quantisation or element type -> the oldest compute capability with it."""

_NOT_ON_10 = ("W8A16", "W4A16", "W4A8_AWQ", "W8A8", "FP8_PER_CHANNEL_PER_TOKEN")
"""Beginnings of quantisations that compute capability 10.x does not compute (tensorrt_llm/builder.py, `build`)."""


class Gpu(Struct, frozen=True):
    """A GPU that this process may use."""

    token: str
    """As ``CUDA_VISIBLE_DEVICES`` names it."""
    name: str
    capability: tuple[int, int]


def installed_release() -> str:
    """The release line of the TensorRT-LLM that is installed. Raises `ExportError` saying what to do without one."""
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise ExportError(f"engines: TensorRT-LLM is not installed here; {_IMAGE}, or {_HF}")
    version = _version()
    match = re.match(r"(\d+)\.(\d+)", version)
    release = f"{match[1]}.{match[2]}" if match else version
    if release in RELEASES:
        return release
    newer = match is not None and (int(match[1]), int(match[2])) > (1, 2)
    why = "builds no engines any more" if newer else "is not known to this program"
    raise ExportError(f"engines: TensorRT-LLM {version} {why}; {_IMAGE} of {RELEASES[0]} to {RELEASES[-1]}, or {_HF}")


def _version() -> str:
    for name in ("tensorrt_llm", "tensorrt-llm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def check_release(release: str, valid: Sequence[str]) -> None:
    """Raise `ExportError` when the installed release cannot serve the export."""
    if release not in valid:
        raise ExportError(
            f"engines: TensorRT-LLM {release} is installed, but this export is for {', '.join(valid)}; export again "
            f"with --trtllm-version {release}, or {_IMAGE} of such a release"
        )


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that this process may use, in order, as nvidia-smi and ``CUDA_VISIBLE_DEVICES`` say. Starts no CUDA."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return []
    command = [program, "--query-gpu=index,uuid,compute_cap,name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_WITHIN_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus: dict[str, Gpu] = {}
    for line in found.splitlines():
        fields = [each.strip() for each in line.split(",", 3)]
        match = re.fullmatch(r"(\d+)\.(\d+)", fields[2]) if len(fields) == 4 else None
        if match:
            gpus[fields[1]] = Gpu(fields[0], fields[3], (int(match[1]), int(match[2])))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(gpus.values())
    tokens = [each.strip() for each in visible.split(",") if each.strip()]
    by_token = {gpu.token: gpu for gpu in gpus.values()} | gpus
    result = []
    for token in tokens:
        known = by_token.get(token) or next((gpu for uuid, gpu in gpus.items() if uuid.startswith(token)), None)
        if known is None:
            break  # CUDA sees nothing from the first unknown one on
        result.append(Gpu(token, known.name, known.capability))
    return result


def check_gpus(gpus: Sequence[Gpu], config: Mapping[str, Any]) -> None:
    """Raise `ExportError` when there is no GPU, or one that cannot compute what config.json asks for."""
    if not gpus:
        raise ExportError(f"engines: no NVIDIA GPU is to be seen here; {_IMAGE} on the machine that will serve")
    quantization = config.get("quantization") or {}
    wanted = {config.get("dtype"), quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")}
    refused = [kind for kind in wanted if kind and (kind == "INT8" or kind.startswith(_NOT_ON_10))]
    for gpu in gpus:
        if gpu.capability[0] == 10 and refused:
            raise ExportError(
                f"engines: TensorRT-LLM computes no {' and no '.join(sorted(refused))} on compute capability 10.x, but "
                f"{gpu.name} (GPU {gpu.token}) has {gpu.capability[0]}.{gpu.capability[1]}; quantise otherwise (fp8, "
                "nvfp4), or build for another GPU"
            )
    for kind in sorted(kind for kind in _CAPABILITIES if kind in wanted):
        lowest, generation = _CAPABILITIES[kind]
        for gpu in gpus:
            if gpu.capability < lowest:
                raise ExportError(
                    f"engines: {kind} needs compute capability {lowest[0]}.{lowest[1]} ({generation}), but "
                    f"{gpu.name} (GPU {gpu.token}) has {gpu.capability[0]}.{gpu.capability[1]}"
                )
