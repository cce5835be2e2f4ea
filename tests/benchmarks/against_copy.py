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
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared_runs import MODELS, START, clear, command_line, make_checkpoint, timed


def copy(files: list[Path], target: Path, num_processes: int) -> float:
    """Seconds to copy `files` with `num_processes` processes and wait for the disk."""
    target.mkdir()
    begun = time.monotonic()
    shares = [files[first::num_processes] for first in range(num_processes)]
    running = [subprocess.Popen(["cp", *map(str, share), str(target)]) for share in shares if share]
    assert all(process.wait() == 0 for process in running)
    subprocess.run(["sync", *(str(target / file.name) for file in files)], check=True)
    return time.monotonic() - begun


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
    parser = command_line(__doc__, runs=5)
    parser.add_argument("--model", choices=MODELS, default="2gb")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before every run")
    options = parser.parse_args()
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
