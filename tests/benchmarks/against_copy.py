"""Time an export against a plain parallel copy of the same bytes, in one run.

    python tests/benchmarks/against_copy.py [--cache DIR] [--model 2gb|8gb|moe] [--runs 5] [--tp 1 2 4] [--cold]

Makes a real Megatron checkpoint once (launch/make_checkpoint.py, tp 2) and keeps it in the cache folder: dense of
2 or 8 GB, or a mixture of 2 GB in some 6000 small expert weights. Then, interleaved, for each target tp:

  copy    as many processes as the export has, each `cp` of its share of the checkpoint's files, then `sync`
  export  `dist-export export` of the same checkpoint; bytes written equal bytes copied; fsync included

Both write new files on the same file system, into a folder that is removed (and synced) outside the
timing. The page cache holds the checkpoint (warm), or the checkpoint is dropped from it before every run (--cold).
"net" takes off what starting Python and importing the exporter costs, measured in the same run. Python finds its
modules compiled, as after an installation, whatever the caller's environment says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
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
    name, settings = MODELS[model]
    folder = cache / name
    if not (folder / "latest_checkpointed_iteration.txt").exists():
        arguments = [part for option, value in settings.items() for part in (f"--{option}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        script = REPOSITORY / "launch" / "make_checkpoint.py"
        subprocess.run([sys.executable, str(script), str(folder), *arguments], check=True, env=environment)
    return folder


def timed(command: list[str]) -> float:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(BYTECODE)}
    begun = time.monotonic()
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - begun


def copy(files: list[Path], target: Path, num_processes: int) -> float:
    """Seconds to copy `files` with `num_processes` processes and wait for the disk."""
    target.mkdir()
    begun = time.monotonic()
    shares = [files[first::num_processes] for first in range(num_processes)]
    running = [subprocess.Popen(["cp", *map(str, share), str(target)]) for share in shares if share]
    assert all(process.wait() == 0 for process in running)
    subprocess.run(["sync", *(str(target / file.name) for file in files)], check=True)
    return time.monotonic() - begun


def clear(path: Path, *, cold: Sequence[Path]) -> None:
    """Remove what a run wrote, and the files `cold` from the page cache; Python's own files stay there."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
    for file in cold:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(checkpoint: Path, work: Path, tp: int, options: argparse.Namespace) -> dict[str, object]:
    """Medians of one target layout."""
    files = sorted(checkpoint.glob("iter_*/*.distcp"))
    cold = files if options.cold else []
    num_processes = min(tp, os.cpu_count() or 1)
    times: dict[str, list[float]] = {"copy": [], "export": [], "start": []}
    export = [sys.executable, "-m", "dist_export", "export", str(checkpoint), str(work / "export"), "--tp", str(tp)]
    for _ in range(options.runs):
        clear(work / "copy", cold=cold)
        times["copy"].append(copy(files, work / "copy", num_processes))
        clear(work / "copy", cold=cold)
        times["export"].append(timed(export))
        times["start"].append(timed([sys.executable, "-c", START]))
        processes = json.loads((work / "export" / "export_manifest.json").read_text())["run"]["processes"]
        clear(work / "export", cold=cold)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tp": tp,
        "processes": num_processes,
        **{f"{name} s": round(value, 2) for name, value in median.items()},
        "whole / copy": round(median["export"] / median["copy"], 2),
        "net / copy": round((median["export"] - median["start"]) / median["copy"], 2),
        "read / needed": round(sum(p["bytes_read"] for p in processes) / sum(p["bytes_needed"] for p in processes), 3),
        "memory growth MiB": max(p["peak_memory"] - p["memory_at_start"] for p in processes) >> 20,
        "copy s min-max": f"{min(times['copy']):.2f}-{max(times['copy']):.2f}",
        "export s min-max": f"{min(times['export']):.2f}-{max(times['export']):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dist_export_benchmarks"
    parser.add_argument("--cache", type=Path, default=default_cache)
    parser.add_argument("--model", choices=MODELS, default="2gb")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before every run")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    checkpoint = make_checkpoint(options.cache, options.model)
    timed([sys.executable, "-c", START])
    with tempfile.TemporaryDirectory(dir=options.cache) as work:
        rows = [compare(checkpoint, Path(work), tp, options) for tp in options.tp]
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
