"""Bytes that the operating system fetched from disk for an export, against those it needed, for several layouts.

    python tests/benchmarks/bytes_read.py [--cache DIR] [--model 2gb|8gb|moe]

The checkpoint's files are dropped from the page cache before every export, so that what all processes fetch
(`read_bytes` of /proc/self/io) is what the export read: counted by the kernel, read-ahead included. `by calls` is what
went through read calls (`rchar`), Python's own and the metadata's included.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shared_runs import MODELS, clear, command_line, make_checkpoint, timed

TRTLLM, BOTH = ("--target", "trtllm"), ("--target", "trtllm", "--target", "hf")
EXPORTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp 1": (1, TRTLLM),
    "tp 2": (2, (*TRTLLM, "--tp", "2")),
    "tp 8 (rows cut along the input dim)": (2, (*TRTLLM, "--tp", "8")),
    "tp 8, one process for all": (1, (*TRTLLM, "--tp", "8")),
    "pp 4": (2, (*TRTLLM, "--pp", "4")),
    "trtllm tp 2 and hf in one pass": (2, (*BOTH, "--tp", "2")),
}
"""Name -> processes, options."""


def run_export(checkpoint: Path, target: Path, num_processes: int, options: Sequence[str]) -> list[dict[str, int]]:
    """What the manifest says of each process of an export that finds nothing in the page cache."""
    clear(target, cold=sorted(checkpoint.glob("iter_*/*.distcp")))
    command = [sys.executable, "-m", "dist_export", "export", str(checkpoint), str(target), *options]
    timed([*command, "--num-processes", str(num_processes)])
    manifest = next(iter(sorted(target.rglob("export_manifest.json"))))
    processes: list[dict[str, int]] = json.loads(manifest.read_text())["run"]["processes"]
    clear(target, cold=())
    return processes


def main() -> None:
    parser = command_line(__doc__, runs=None)
    parser.add_argument("--model", choices=MODELS, default="2gb")
    options = parser.parse_args()
    checkpoint = make_checkpoint(options.cache, options.model)
    print("| export | processes | needed GB | from disk GB | from disk / needed | by calls / needed | written GB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.cache) as work:
        for name, (num_processes, more) in EXPORTS.items():
            processes = run_export(checkpoint, Path(work) / "export", num_processes, more)
            keys = ("bytes_needed", "bytes_read_from_disk", "bytes_read_by_calls", "bytes_written")
            needed, fetched, called, written = (sum(process[key] for process in processes) for key in keys)
            cells = (f"{needed / 1e9:.3f}", f"{fetched / 1e9:.3f}", f"{fetched / needed:.3f}", f"{called / needed:.3f}")
            print("| " + " | ".join((name, str(num_processes), *cells, f"{written / 1e9:.2f}")) + " |", flush=True)


if __name__ == "__main__":
    main()
