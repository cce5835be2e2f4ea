"""Time the arithmetic of an export on a GPU: kernels against the device's own copy, blocks with and without overlap.

    python tests/benchmarks/gpu_kernels.py [--device cuda:0] [--megabytes 256] [--runs 20]

kernels  each operation on one large block on the device: bytes read and written once, by the time of CUDA events,
         as a share of what `Tensor.copy_` moves there
lanes    host memory to host memory through `dist_export.convert.torch_lanes`, in blocks of the size that an export
         uses: with several blocks under way as exports have them, and each waited for before the next; beside the copy
         of the same bytes from pinned memory to the device, the fastest that is possible
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_export.convert.encode import _ENCODERS
from dist_export.convert.execute import DEVICE_TILE_BYTES
from dist_export.convert.torch_lanes import CudaLanes
from dist_export.plan.recipes import Codes
from dist_export.tensors.dtypes import BFLOAT16

Work = Callable[[torch.Tensor], torch.Tensor]


def works(device: str) -> dict[str, Work]:
    """Name -> what is done with a bfloat16 block ``[rows, 4096]``."""
    scale = torch.full((1, 1), 0.01, device=device)
    found: dict[str, Work] = {
        "bfloat16 to float16": lambda block: block.to(torch.float16),
        "bfloat16 + 1": lambda block: block + 1,
    }
    for codes in (Codes.E4M3, Codes.INT8, Codes.INT4, Codes.E2M1):
        found[codes.name] = lambda block, codes=codes: _ENCODERS[codes](block.float(), scale)  # type: ignore[misc]
    return found


def seconds_on_device(work: Callable[[], object], runs: int) -> float:
    """Median of CUDA's own clock."""
    times = []
    for _ in range(runs + 3):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended) / 1e3)
    return statistics.median(times[3:])


def kernels(device: str, num_bytes: int, runs: int) -> None:
    block = torch.randn(num_bytes // 8192, 4096, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(block)
    copy = 2 * block.nbytes / seconds_on_device(lambda: target.copy_(block), runs)
    print(f"| kernel | GB/s | of the copy ({copy / 1e9:.0f} GB/s) |\n|---|---|---|")
    for name, work in works(device).items():
        moved = block.nbytes + work(block).nbytes
        rate = moved / seconds_on_device(lambda work=work: work(block), runs)  # type: ignore[misc]
        print(f"| {name} | {rate / 1e9:.0f} | {rate / copy:.2f} |")


def through(lanes: CudaLanes, blocks: Sequence[np.ndarray], work: Work, in_flight: int) -> float:
    """Seconds for all blocks."""
    begun, flight = time.monotonic(), []
    for block in blocks:
        flight.append(lanes.send(block, BFLOAT16, lambda values: (work(values),), lambda results: results[0]))
        while len(flight) > in_flight:
            with flight.pop(0):
                pass
    for pending in flight:
        with pending:
            pass
    return time.monotonic() - begun


def overlap(device: str, num_bytes: int, runs: int) -> None:
    rows = DEVICE_TILE_BYTES // 8192
    block = torch.randn(rows, 4096, dtype=torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    blocks = [block] * max(num_bytes // DEVICE_TILE_BYTES, 8)
    total = sum(each.nbytes for each in blocks)
    pinned, there = torch.empty(total, dtype=torch.uint8, pin_memory=True), torch.empty(total, dtype=torch.uint8)
    there, named = there.to(device), works(device)
    limit = total / seconds_on_device(lambda: there.copy_(pinned, non_blocking=True), runs)
    lanes = CudaLanes(device, num_bytes=4 << 30)
    last = f"of the copy there ({limit / 1e9:.1f} GB/s)"
    print(f"\n| host to host | overlapped GB/s | one by one GB/s | overlapped / one by one | {last} |")
    print("|---|---|---|---|---|")
    for name, work in named.items():
        each = {n: statistics.median(through(lanes, blocks, work, n) for _ in range(max(runs // 4, 3))) for n in (2, 0)}
        with_overlap, without = (total / each[n] / 1e9 for n in (2, 0))
        ratios = f"{with_overlap / without:.2f} | {1e9 * with_overlap / limit:.2f}"
        print(f"| {name} | {with_overlap:.1f} | {without:.1f} | {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    if options.device == "cuda":
        options.device = "cuda:0"
    torch.cuda.set_device(options.device)
    print(torch.cuda.get_device_name(options.device), "torch", torch.__version__)
    kernels(options.device, options.megabytes << 20, options.runs)
    overlap(options.device, options.megabytes << 20, options.runs)


if __name__ == "__main__":
    main()
