"""What the benchmarks share: checkpoints that are made once and kept, and commands that are timed alike."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LLAMA = {"style": "llama", "tp": 2, "heads": 32, "kv-groups": 8, "vocab": 32000, "seq": 2048, "seed": 1}
MODELS = {
    "2gb": ("llama_2gb", {**LLAMA, "hidden": 2048, "layers": 16, "ffn": 7168}),
    "8gb": ("llama_8gb", {**LLAMA, "hidden": 4096, "layers": 20, "ffn": 11008}),
    "moe": (
        "mixtral_2gb",
        {**LLAMA, "style": "mixtral", "hidden": 1024, "layers": 16, "heads": 16, "kv-groups": 4, "ffn": 2048}
        | {"experts": 64, "top-k": 2, "moe-ffn": 256, "tp": 1, "ep": 2},
    ),
}
"""Name on the command line -> folder in the cache, options of launch/make_checkpoint.py."""
BYTECODE = Path(tempfile.gettempdir()) / f"dist_export_benchmarks_{os.getuid()}"
START = "import dist_export.launcher, dist_export.api"


def make_checkpoint(cache: Path, model: str = "2gb") -> Path:
    """The checkpoint folder, made on first use."""
    cache.mkdir(parents=True, exist_ok=True)
    name, settings = MODELS[model]
    folder = cache / name
    if not (folder / "latest_checkpointed_iteration.txt").exists():
        arguments = [part for option, value in settings.items() for part in (f"--{option}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        script = REPOSITORY / "launch" / "make_checkpoint.py"
        subprocess.run([sys.executable, str(script), str(folder), *arguments], check=True, env=environment)
    return folder


def timed(command: list[str]) -> float:
    """Seconds of a command that finds its modules compiled."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(BYTECODE)}
    begun = time.monotonic()
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - begun


def command_line(description: str | None, *, runs: int | None) -> argparse.ArgumentParser:
    """A parser with ``--cache`` and, unless `runs` is None, ``--runs``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dist_export_benchmarks"
    parser.add_argument("--cache", type=Path, default=cache, help="folder for checkpoints that are kept")
    if runs is not None:
        parser.add_argument("--runs", type=int, default=runs)
    return parser


def clear(path: Path, *, cold: Sequence[Path]) -> None:
    """Remove what a run wrote, and the files `cold` from the page cache; Python's own files stay there."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
    for file in cold:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
