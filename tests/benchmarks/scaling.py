"""How an export's time changes with the number of processes, and its memory with the size of the model, in one run.

    python tests/benchmarks/scaling.py [--cache DIR] [--runs 3] [--processes 1 2 4]

strong  the same 2 GB checkpoint to tp 4 with 1, 2 and 4 processes of one thread
weak    1 GB of model for each process: with n processes a checkpoint of n GB to tp n
memory  peak of a process and what it grew by, from 2 to 8 GB of model (tp 2, two processes)

Checkpoints are real ones of Megatron-Core, made once and kept. Runs of all rows are interleaved; every export ends
with its files on disk. More processes than cores show how they share them, no more.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from shared_runs import LLAMA, MODELS, START, clear, command_line, make_checkpoint, timed

SIZED = {**LLAMA, "hidden": 2048, "ffn": 7168}
MODELS.update({f"{n}gb_deep": (f"llama_{n}gb_deep", {**SIZED, "layers": 8 * n}) for n in (1, 2, 4)})
Row = tuple[str, str, int, int]
"""Kind, model, tp, processes."""


def run_export(checkpoint: Path, target: Path, tp: int, num_processes: int) -> tuple[float, list[dict[str, int]]]:
    """Seconds, and what the manifest says of each process."""
    command = [sys.executable, "-m", "dist_export", "export", str(checkpoint), str(target), "--tp", str(tp)]
    seconds = timed([*command, "--num-processes", str(num_processes), "--num-threads", "1"])
    return seconds, json.loads((target / "export_manifest.json").read_text())["run"]["processes"]


def rows_of(processes: list[int]) -> list[Row]:
    strong = [("strong", "2gb", 4, n) for n in processes]
    weak = [("weak", f"{n}gb_deep", n, n) for n in processes if f"{n}gb_deep" in MODELS]
    return [*strong, *weak, ("memory", "2gb", 2, 2), ("memory", "8gb", 2, 2)]


def measure(rows: list[Row], find: Callable[[str], Path], work: Path, runs: int) -> None:
    found: dict[Row, list[tuple[float, list[dict[str, int]]]]] = {row: [] for row in rows}
    for _ in range(runs):
        for row in rows:
            _, model, tp, num_processes = row
            found[row].append(run_export(find(model), work / "export", tp, num_processes))
            clear(work / "export", cold=())
    print("| what | model | tp | processes | whole s (min-max) | GB/s | peak MiB per process | growth MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for row, results in found.items():
        times = [seconds for seconds, _ in results]
        last = results[-1][1]
        rate = sum(process["bytes_written"] for process in last) / statistics.median(times) / 1e9
        peak = max(process["peak_memory"] for process in last) >> 20
        growth = max(process["peak_memory"] - process["memory_at_start"] for process in last) >> 20
        spread = f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
        print("| " + " | ".join(map(str, (*row, spread, f"{rate:.1f}", peak, growth))) + " |")


def main() -> None:
    parser = command_line(__doc__, runs=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    rows = rows_of(options.processes)
    checkpoints = {model: make_checkpoint(options.cache, model) for model in dict.fromkeys(row[1] for row in rows)}
    timed([sys.executable, "-c", START])
    with tempfile.TemporaryDirectory(dir=options.cache) as work:
        measure(rows, checkpoints.__getitem__, Path(work), options.runs)


if __name__ == "__main__":
    main()
