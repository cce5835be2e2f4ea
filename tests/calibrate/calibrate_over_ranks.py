"""Calibrations over several ranks, one after another; a program of its own, run by the tests.

    python tests/calibrate/calibrate_over_ranks.py CHECKPOINT FOLDER SCHEME:TP:PP:DATA …

Its ranks are forks that have everything imported, told by torchrun's variables who they are. Writes
FOLDER/SCHEME.TP.PP.safetensors, and FOLDER/SCHEME.TP.PP.json: of every rank its exit code, the bytes it read of the
checkpoint's files and what it printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def run_rank(rank: int, arguments: list[str], world_size: int, port: int, results: str) -> None:
    """One rank of one calibration."""
    import torch

    from dist_export.calibrate import command
    from dist_export.cli import main

    torch.set_num_threads(1)
    world = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    read: list[int] = []

    class Counting(command.SourceFiles):
        def close(self) -> None:
            read.append(self.num_bytes_read)
            super().close()

    command.SourceFiles = Counting  # type: ignore[misc]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(["calibrate", *arguments])
    told = {"code": code, "bytes_read": sum(read), "text": text.getvalue()}
    Path(f"{results}.{rank}").write_text(json.dumps(told))


def calibrate(checkpoint: str, folder: Path, asked: str) -> None:
    """All ranks of one calibration."""
    from torch.multiprocessing.spawn import start_processes

    scheme, tp, pp, data = asked.split(":")
    name, world_size = folder / f"{scheme}.{tp}.{pp}", int(tp) * int(pp)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [checkpoint, f"{name}.safetensors", "--scheme", scheme, "--data", data, "--tp", tp, "--pp", pp]
    ranks = (arguments, world_size, port, str(name))
    start_processes(run_rank, ranks, world_size, start_method="fork")  # type: ignore[no-untyped-call]
    told = [json.loads(Path(f"{name}.{rank}").read_text()) for rank in range(world_size)]
    Path(f"{name}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    import megatron.core.models.gpt  # noqa: F401  imported before the fork
    import modelopt.torch.quantization  # noqa: F401

    for each in sys.argv[3:]:
        calibrate(sys.argv[1], Path(sys.argv[2]), each)
