#!/usr/bin/env python3
"""What metadata and planning cost at the sizes of 405B dense and 1T mixture models. Prints one line per figure.

    python tests/benchmarks/scale.py [--folder FOLDER] [--only NAME]

Checkpoints are real metadata without weights (`support.large_models`), written to FOLDER (default: a temporary
one) and removed. Peak memory is the largest resident size of a process of its own, interpreter included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_export.plan.export import ExportPlan

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

MIB = 1 << 20


def peak_memory() -> float:
    """Largest resident size of this process so far, in MiB. (getrusage would count the one it was forked from.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def measure_inspect(folder: Path) -> None:
    """``dist-export inspect`` at 60 000 chunks and of a small checkpoint."""
    from support.large_models import dense_405b, moe_1t, num_chunks, write_large_checkpoint

    for model in (dense_405b(), moe_1t(num_layers=78)):
        path = write_large_checkpoint(folder / "inspect", model)
        size = (path / ".metadata").stat().st_size / MIB
        begun = time.perf_counter()
        command = [sys.executable, "-m", "dist_export", "inspect", str(path)]
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        print(f"inspect, {num_chunks(model.tensors())} chunks, {size:.1f} MiB of metadata: {seconds:.2f} s", flush=True)


def measure_index(folder: Path) -> None:
    """Parsing 300 000 chunks with save plans inside, stacked and with a key per layer and expert."""
    from support.large_models import moe_1t, num_chunks, write_large_checkpoint

    for per_layer in (False, True):
        model = moe_1t(expert_tp=6, per_layer=per_layer)
        path = write_large_checkpoint(folder / f"index{per_layer:d}", model)
        size = (path / ".metadata").stat().st_size / MIB
        found = in_process(read_index, path)
        print(
            f"index, {num_chunks(model.tensors())} chunks, {len(model.tensors())} names, {size:.1f} MiB of metadata: "
            f"{found['seconds']:.2f} s, peak {found['child']:.0f} MiB in the parsing process, {found['peak']:.0f} MiB "
            f"in its parent, table {found['table']:.1f} MiB, ready in {found['map']:.3f} s where it is mapped",
            flush=True,
        )


def read_index(path: Path) -> dict[str, float]:
    """Time and memory of the chunk table of a checkpoint."""
    from dist_export.checkpoint.index import CheckpointIndex
    from dist_export.checkpoint.torch_dist import read_index

    begun = time.perf_counter()
    index = read_index(path)
    seconds, peak = time.perf_counter() - begun, peak_memory()
    table = index.to_bytes()
    begun = time.perf_counter()
    CheckpointIndex.from_buffer(table)
    return {
        "seconds": seconds,
        "child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "peak": peak,
        "table": len(table) / MIB,
        "map": time.perf_counter() - begun,
    }


def measure_plans(folder: Path) -> None:
    """Planning one rank, and planning and validating all."""
    for name in PLANS:
        one, every = in_process(plan_one, name), in_process(plan_all, name)
        print(
            f"plan, {name}: catalogue {one['catalog']:.2f} s, one rank {one['seconds']:.3f} s "
            f"({one['tensors']:.0f} tensors, {one['pieces']:.0f} pieces, peak {one['peak']:.0f} MiB); all "
            f"{every['ranks']:.0f} ranks planned and validated in {every['seconds']:.2f} s, peak "
            f"{every['peak']:.0f} MiB",
            flush=True,
        )


def _plan(name: str) -> tuple[ExportPlan, float]:
    from support import large_models
    from support.large_plans import large_plan, shapes_of

    from dist_export.models.catalog import SourceCatalog

    make, changes, layout = PLANS[name]
    model = getattr(large_models, make)(**changes)
    shapes = shapes_of(model)
    begun = time.perf_counter()
    catalog = SourceCatalog(shapes)
    seconds = time.perf_counter() - begun
    return large_plan(model, **layout, catalog=catalog), seconds


PLANS = {
    "405B dense, tp8 pp16": ("dense_405b", {}, {"tp": 8, "pp": 16}),
    "405B dense, tp8 pp16, a key per layer": ("dense_405b", {"per_layer": True}, {"tp": 8, "pp": 16}),
    "1T mixture, tp8 (experts: ep8) pp8": ("moe_1t", {}, {"tp": 8, "pp": 8, "moe_ep": 8}),
    "1T mixture, tp32 (experts: ep32) pp8": ("moe_1t", {}, {"tp": 32, "pp": 8, "moe_ep": 32}),
    "1T mixture, tp8 (experts: tp8) pp8": ("moe_1t", {}, {"tp": 8, "pp": 8, "moe_ep": 1}),
    "1T mixture, tp8 (experts: ep8) pp8, a key per layer and expert": (
        "moe_1t", {"per_layer": True}, {"tp": 8, "pp": 8, "moe_ep": 8}
    ),
}  # fmt: skip
"""Name -> model, its changes, target layout. The source is trained with tp8, whatever its ep and pp."""


def plan_one(name: str) -> dict[str, float]:
    """Plan the second file only."""
    plan, seconds = _plan(name)
    begun = time.perf_counter()
    shard = plan.shard(1)
    took = time.perf_counter() - begun
    return {
        "catalog": seconds,
        "seconds": took,
        "peak": peak_memory(),
        "tensors": len(shard.tensors),
        "pieces": sum(len(tensor.view.pieces) for tensor in shard.tensors),
    }


def plan_all(name: str) -> dict[str, float]:
    """Plan and validate every file, none kept."""
    from dist_export.plan.export import validate

    plan, _ = _plan(name)
    begun = time.perf_counter()
    validate(plan)
    return {"ranks": plan.num_files, "seconds": time.perf_counter() - begun, "peak": peak_memory()}


def in_process(function: Callable[..., dict[str, float]], argument: object) -> dict[str, float]:
    """The result of `function(argument)` in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--call", function.__name__, str(argument)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


MEASUREMENTS = {"inspect": measure_inspect, "index": measure_index, "plans": measure_plans}
CALLS = {"read_index": lambda path: read_index(Path(path)), "plan_one": plan_one, "plan_all": plan_all}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write checkpoints (300 MB)")
    parser.add_argument("--only", choices=MEASUREMENTS, help="one of the measurements")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        print(json.dumps(CALLS[options.call[0]](options.call[1])))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, measure in MEASUREMENTS.items():
            if options.only in (None, name):
                measure(Path(folder))


if __name__ == "__main__":
    main()
