"""The exporter with a rank that is killed: ``killed_rank.py RANK ARGUMENTS…`` is ``dist-export ARGUMENTS…``, and that
rank kills itself once it has read a few parts of the checkpoint's tensors. Tests start it under launchers."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_export import cli
from dist_export.convert.sources import SourceFiles
from dist_export.runtime.world import detect_world

READS = 3


def die_after(num_reads: int) -> None:
    """This process kills itself when it has read so many parts."""
    read_into, left = SourceFiles.read_into, [num_reads]

    def last_read(sources: SourceFiles, file: int, offset: int, buffer: memoryview) -> None:
        read_into(sources, file, offset, buffer)
        left[0] -= 1
        if not left[0]:
            os.write(1, f"process {os.getpid()} dies at {time.monotonic()}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    SourceFiles.read_into = last_read  # type: ignore[method-assign]


if __name__ == "__main__":
    if detect_world(os.environ).rank == int(sys.argv[1]):
        die_after(READS)
    sys.exit(cli.main(sys.argv[2:]))
