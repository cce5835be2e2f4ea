"""Running the programs next to this file that build live Megatron-Core models on ranks of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_live(program: str, folder: Path, *arguments: object) -> Path:
    """Build a model on its ranks, save it, and do with it what `program` does; returns the folder of all that."""
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), str(folder), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    return folder
