"""The ledger of written bytes: proof that every byte of every tensor was written once, and its checksum.

Tiles finish in any order and in any process. Each writes runs of bytes and notes (tensor, offset,
length, CRC-32). CRCs of neighbouring runs combine into the CRC of both, so the checksum of a whole
tensor is the plain CRC-32 of its bytes whatever the order, the number of threads or of processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock

from isal.isal_zlib import crc32, crc32_combine

from dist_export.errors import Faults

Run = tuple[int, int, int]
"""(offset in the tensor, length, CRC-32), in bytes."""
TensorKey = tuple[int, int]
"""(output file number, tensor number in its plan)."""

PIECE_BYTES = 64 << 20  # longest run that compaction makes: short enough to be checked as one when it is copied
COMPACT_EVERY = 1 << 14  # runs kept per tensor table before neighbours are merged: bounds memory, costs little


class Ledger:
    """Runs written by one process. `note` may be called from several threads."""

    def __init__(self) -> None:
        self._runs: dict[TensorKey, list[Run]] = {}
        self._lock = Lock()
        self._since_compaction = 0

    def note(self, key: TensorKey, offset: int, data: memoryview) -> Run:
        """Note that `data` (contiguous bytes) was written at `offset` of a tensor; returns the run."""
        run = (offset, data.nbytes, int(crc32(data)))
        self.take_over(key, (run,))
        return run

    def take_over(self, key: TensorKey, runs: Iterable[Run]) -> None:
        """Note runs whose checksums are known."""
        with self._lock:
            self._runs.setdefault(key, []).extend(runs)
            self._since_compaction += 1
            if self._since_compaction >= COMPACT_EVERY:
                self._runs = {key: merged(runs, longest=PIECE_BYTES) for key, runs in self._runs.items()}
                self._since_compaction = 0

    def runs(self, *, longest: int | None = None) -> dict[TensorKey, list[Run]]:
        """What was written, neighbours merged as `merged` does it."""
        with self._lock:
            return {key: merged(runs, longest=longest) for key, runs in self._runs.items()}


def merged(runs: Iterable[Run], *, longest: int | None = None) -> list[Run]:
    """Runs in order of offset, with neighbours that touch made one. Overlaps are kept apart.

    Runs of more than `longest` bytes are not made, where it is given.
    """
    result: list[Run] = []
    for offset, length, checksum in sorted(runs):
        touching = bool(result) and result[-1][0] + result[-1][1] == offset
        if touching and (longest is None or result[-1][1] + length <= longest):
            first, before, left = result[-1]
            result[-1] = (first, before + length, int(crc32_combine(left, checksum, length)))
        else:
            result.append((offset, length, checksum))
    return result


def checksum_of(runs: Iterable[Run], *, name: str, num_bytes: int, faults: Faults) -> int:
    """The CRC-32 of a tensor written as `runs`; a gap or an overlap is added to `faults`."""
    if num_bytes == 0:
        return 0
    whole = merged(runs)
    if len(whole) == 1 and whole[0][:2] == (0, num_bytes):
        return whole[0][2]
    written = sum(length for _, length, _ in whole)
    faults.add(f"{name}: {written} bytes were written in {len(whole)} runs, expected {num_bytes} in one")
    return 0
