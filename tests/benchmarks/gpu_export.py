"""Time whole exports on a GPU, with and without overlap of its copies and its work, against the same on the CPU.

    python tests/benchmarks/gpu_export.py [--device cuda:0] [--megabytes 2048] [--runs 5] [--folder /dev/shm]

A float32 Llama-style checkpoint is exported in this process: cast to bfloat16, and quantised to FP8 with a scale per
channel, which needs no calibration. With overlap a thread has several blocks under way, as exports have; without, it
waits for each before it sends the next. Figures are of the transfer, medians, with files in --folder; what is written
is compared.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import write_torch_dist  # noqa: E402

from dist_export import api  # noqa: E402
from dist_export.api import Source  # noqa: E402
from dist_export.convert.torch_lanes import BLOCKS_IN_FLIGHT, CudaLanes  # noqa: E402
from dist_export.quantization import QuantizationOptions  # noqa: E402
from dist_export.runtime.group import Group  # noqa: E402
from dist_export.session import ExportSession, RunOptions  # noqa: E402
from dist_export.targets.trtllm.target import TrtllmOptions  # noqa: E402

KINDS = ("bfloat16", "fp8_per_channel")
VOCABULARY, HIDDEN, FFN = 8192, 2048, 7168


def make_checkpoint(folder: Path, num_bytes: int) -> Path:
    """A float32 model of about so many bytes."""
    fixed, layer = 2 * VOCABULARY * HIDDEN * 4, (HIDDEN * (3 * FFN + HIDDEN * 5 // 2)) * 4
    model = small_model(
        LLAMA, num_layers=max(round((num_bytes - fixed) / layer), 1), hidden_size=HIDDEN, ffn_hidden_size=FFN,
        num_attention_heads=16, num_query_groups=4, kv_channels=128, vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY, dtype=torch.float32, scale=0.02,
    )  # fmt: skip
    return write_torch_dist(folder / "iter_0000010", model.tensors, args=model.args)


def transfer(checkpoint: Path, output: Path, kind: str, *, device: str, num_threads: int) -> float:
    """Seconds of one export's transfer."""
    algorithm = "auto" if kind == "bfloat16" else kind
    model = api.open_model(Source(checkpoint=checkpoint, quantization=QuantizationOptions(algorithm=algorithm)))
    job = api.plan_job(model, (TrtllmOptions(dtype="bfloat16"),))
    options = RunOptions(output=output, overwrite=True, device=device, num_threads=num_threads, host_memory=2 << 30)
    with Group.single() as group:
        session = ExportSession(model.checkpoint, job, options, group)
        session.run()
    return session.report.seconds["transfer"]


def tensor_file(output: Path) -> bytes:
    return (output / "rank0.safetensors").read_bytes()


def measure(kind: str, checkpoint: Path, folder: Path, *, device: str, runs: int, num_threads: int) -> None:
    """Print a line of the table."""
    places = {"with": (device, BLOCKS_IN_FLIGHT), "without": (device, 0), "cpu": ("cpu", 0)}
    times: dict[str, list[float]] = {name: [] for name in places}
    for _ in range(runs + 1):
        for name, (where, in_flight) in places.items():
            CudaLanes.in_flight = in_flight
            seconds = transfer(checkpoint, folder / name, kind, device=where, num_threads=num_threads)
            times[name].append(seconds)
    assert tensor_file(folder / "with") == tensor_file(folder / "without") == tensor_file(folder / "cpu"), kind
    for name in places:
        shutil.rmtree(folder / name)
    overlapped, alone, host = (statistics.median(each[1:]) for each in times.values())  # the first warms up
    cells = [f"{seconds:.3f}" for seconds in (overlapped, alone, host)]
    cells += [f"{alone / overlapped:.2f}", f"{host / overlapped:.2f}"]
    print(f"| {kind} | {num_threads} |", " | ".join(cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        checkpoint = make_checkpoint(Path(name), options.megabytes << 20)
        print("torch", torch.__version__, "on", options.device)
        print("| export | threads | with overlap s | without s | CPU s | without / with overlap | CPU / GPU |")
        print("|---|---|---|---|---|---|---|")
        for num_threads in (1, 2):
            for kind in KINDS:
                where = {"device": options.device, "runs": options.runs, "num_threads": num_threads}
                measure(kind, checkpoint, Path(name), **where)


if __name__ == "__main__":
    main()
