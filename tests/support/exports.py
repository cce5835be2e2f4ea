"""Running the exporter as a user does, and reading what it wrote with the reference library."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

REPOSITORY = Path(__file__).parents[2]


def run_command(*arguments: object, timeout: float = 120, env: dict[str, str] | None = None):
    """``python -m dist_export …`` in a process of its own; returns the finished process with its text."""
    return subprocess.run(
        [sys.executable, "-m", "dist_export", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def export(checkpoint: Path, output: Path, *arguments: object) -> Path:
    """Export and return the output folder; the test fails with what was printed when the command fails."""
    process = run_command("export", checkpoint, output, *arguments)
    assert process.returncode == 0, process.stdout + process.stderr
    return output


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, read by the reference library."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def fingerprints(path: Path) -> dict[str, dict[str, object]]:
    """Name -> dtype, shape and SHA-256 of the bytes, as the files of expected tensors have them."""
    with safe_open(path, "pt") as file:
        return {
            name: {
                "dtype": file.get_slice(name).get_dtype(),
                "shape": file.get_slice(name).get_shape(),
                "sha256": hashlib.sha256(raw_bytes(file.get_tensor(name))).hexdigest(),
            }
            for name in file.keys()  # noqa: SIM118
        }


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def config_of(output: Path) -> dict[str, object]:
    """config.json of an export."""
    return json.loads((output / "config.json").read_text())
