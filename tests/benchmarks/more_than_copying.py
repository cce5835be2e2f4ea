"""Time what does more than an export of bf16 to bf16: casts, quantisation, two targets, SHA-256, and `verify`.

    python tests/benchmarks/more_than_copying.py [--cache DIR] [--model 2gb|8gb|moe] [--runs 3] [--device auto]

All rows are run in turn, and each is given as a ratio to the plain export to tp 2 of the same run. Quantisation is what
needs no calibration: FP8 with scales of rows, which measures every weight first, and weights alone, which
TensorRT-LLM's loader quantises. `verify` compares every byte of the plain export with the checkpoint; its ratio is also
given to reading both with `cat`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared_runs import MODELS, clear, command_line, make_checkpoint, timed

PLAIN, VERIFY, CAT = "plain, tp 2", "verify of the plain export", "cat of checkpoint and export"
EXPORTS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "float16": ("--dtype", "float16"),
    "float32": ("--dtype", "float32"),
    "hf": ("--target", "hf"),
    "trtllm and hf": ("--target", "trtllm", "--target", "hf"),
    "--sha256": ("--sha256",),
    "int8_wo": ("--quantization", "int8_wo"),
    "fp8_per_channel": ("--quantization", "fp8_per_channel"),
}
"""Name -> options."""


def read_all(folders: list[Path]) -> float:
    """Seconds that `cat` takes for all of their files."""
    files = [str(path) for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    begun = time.monotonic()
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def measure(checkpoint: Path, work: Path, options: argparse.Namespace) -> dict[str, float]:
    """Medians by row."""
    program, target = [sys.executable, "-m", "dist_export"], work / "export"
    times: dict[str, list[float]] = {name: [] for name in (*EXPORTS, VERIFY, CAT)}
    for _ in range(options.runs):
        for name, more in EXPORTS.items():
            where = ["export", str(checkpoint), str(target)]
            times[name].append(timed([*program, *where, "--tp", "2", "--device", options.device, *more]))
            if name == PLAIN:
                times[VERIFY].append(timed([*program, "verify", str(checkpoint), str(target)]))
                times[CAT].append(read_all([checkpoint, target]))
            clear(target, cold=())
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = command_line(__doc__, runs=3)
    parser.add_argument("--model", choices=MODELS, default="2gb")
    parser.add_argument("--device", default="auto", help="for the arithmetic: auto, cpu, cuda")
    options = parser.parse_args()
    checkpoint = make_checkpoint(options.cache, options.model)
    with tempfile.TemporaryDirectory(dir=options.cache) as work:
        found = measure(checkpoint, Path(work), options)
    print("| what | s | of the plain export |\n|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} | {seconds / found[PLAIN]:.2f} |")
    print(f"\nverify / cat: {found[VERIFY] / found[CAT]:.2f}")


if __name__ == "__main__":
    main()
