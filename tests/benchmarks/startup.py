"""Time until something happens: `--help`, `inspect`, `plan`, and the first byte that an export writes.

    python tests/benchmarks/startup.py [--cache DIR] [--model 2gb|8gb|moe] [--runs 9]

All commands are run in turn, beside Python itself (`python -c pass`), which each of them contains. The first byte is
that of `dist-export export --tp 2`: its timeline (`--profile`) says on the system's clock when a rank wrote first.
Modules are compiled and the checkpoint is in the page cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from shared_runs import MODELS, clear, command_line, make_checkpoint, timed


def first_write(checkpoint: Path, work: Path) -> float:
    """Seconds from the start of an export to the first write of a rank."""
    command = [sys.executable, "-m", "dist_export", "export", str(checkpoint), str(work / "export"), "--tp", "2"]
    begun = time.monotonic()
    timed([*command, "--profile", str(work / "profile")])
    events = [
        event for path in (work / "profile").glob("*.json") for event in json.loads(path.read_text())["traceEvents"]
    ]
    clear(work / "export", cold=())
    clear(work / "profile", cold=())
    return min(event["ts"] for event in events if event["name"] == "write") / 1e6 - begun


def measure(checkpoint: Path, work: Path, runs: int) -> dict[str, float]:
    """Medians by name."""
    program = [sys.executable, "-m", "dist_export"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "dist-export --help": [*program, "--help"],
        "dist-export inspect": [*program, "inspect", str(checkpoint)],
        "dist-export plan --tp 2": [*program, "plan", str(checkpoint), "--tp", "2"],
    }
    times: dict[str, list[float]] = {name: [] for name in (*commands, "first byte of an export")}
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(timed(command))
        times["first byte of an export"].append(first_write(checkpoint, work))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = command_line(__doc__, runs=9)
    parser.add_argument("--model", choices=MODELS, default="2gb")
    options = parser.parse_args()
    checkpoint = make_checkpoint(options.cache, options.model)
    with tempfile.TemporaryDirectory(dir=options.cache) as work:
        first_write(checkpoint, Path(work))  # compiles modules
        found = measure(checkpoint, Path(work), options.runs)
    print("| what | s | times Python's own start |\n|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.3f} | {seconds / found['python -c pass']:.1f} |")


if __name__ == "__main__":
    main()
