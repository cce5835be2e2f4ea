"""Changed blocks: what a process would write is compared with the old file, and what differs goes to a log.

A log is two files: ``NAME.blocks`` with the new bytes one after the other, ``NAME.index`` with a `RECORD` for each run
of them. The old files are only read.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock, local

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

from dist_export.convert.outputs import write_error
from dist_export.errors import ExportError

BLOCK_BYTES = 64 << 10
"""Compared, and written where any byte differs. A run of the executor is cut into blocks from its start."""
BLOCKS, INDEX = ".blocks", ".index"
RECORD = np.dtype([("file", "<u4"), ("length", "<u4"), ("offset", "<u8"), ("crc32", "<u4")])
"""Where a run of changed bytes goes: the number of the file in the job, bytes, bytes from the file's start."""

_PACK = struct.Struct("<IIQI")
_INDEX_BUFFER = 64 << 10


class BlockLog:
    """One process's log. `append` may be called from several threads."""

    def __init__(self, folder: Path, name: str) -> None:
        """Create it. Raises `ExportError` for a disk that takes nothing."""
        self.name, self.num_blocks, self.num_bytes = name, 0, 0
        self._paths = folder / f"{name}{BLOCKS}", folder / f"{name}{INDEX}"
        self.memory = local()
        """Of each thread: what it compares with, for all files."""
        self._lock, self._index = Lock(), bytearray()
        self._descriptors: list[int] = []
        for path in self._paths:
            try:
                self._descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))
            except OSError as error:
                self.close()
                raise write_error(path, error) from error

    def append(self, file: int, offset: int, data: memoryview) -> None:
        """Note that `data` belongs at byte `offset` of a file."""
        record = _PACK.pack(file, data.nbytes, offset, int(crc32(data)))
        with self._lock:
            position, self.num_bytes = self.num_bytes, self.num_bytes + data.nbytes
            self.num_blocks += -(-data.nbytes // BLOCK_BYTES)
            self._index += record
            if len(self._index) >= _INDEX_BUFFER:
                self._write_index()
        write_all(self._descriptors[0], position, data, self._paths[0])

    def finish(self) -> None:
        """Wait until all of it is on disk and close. Raises `ExportError`."""
        with self._lock:
            self._write_index()
        for descriptor, path in zip(self._descriptors, self._paths, strict=True):
            sync(descriptor, path)
        self.close()

    def close(self) -> None:
        """Close without waiting for the disk. May be called again."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def _write_index(self) -> None:
        data, self._index = memoryview(self._index), bytearray()
        while data:
            try:
                data = data[os.write(self._descriptors[1], data) :]
            except OSError as error:
                raise write_error(self._paths[1], error) from error


class ComparedFile:
    """A file of the old export, to which new bytes are "written": those that differ go to a log. Thread-safe."""

    def __init__(self, number: int, path: Path, log: BlockLog, starts: Sequence[int]) -> None:
        """`starts` are the bytes from the file's start at which its tensors begin, in ascending order."""
        self.number, self.path, self.num_bytes_written = number, path, 0
        self.changed: set[int] = set()
        """Tensors with a changed byte, by their place in `starts`."""
        self._log, self._starts, self._lock = log, starts, Lock()
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ExportError(f"{path}: {error.strerror}") from error

    def write_at(self, offset: int, data: memoryview) -> None:
        """Log the blocks of `data`, which lies in one tensor, that are not what the old file has at `offset`."""
        data = data.cast("B")
        old = self._buffer(data.nbytes)
        read_all(self._descriptor, offset, old, self.path)
        num_bytes = 0
        for first, end in _changed(old, data):
            self._log.append(self.number, offset + first, data[first:end])
            num_bytes += end - first
        if num_bytes:
            with self._lock:
                self.num_bytes_written += num_bytes
                self.changed.add(bisect_right(self._starts, offset) - 1)

    def close(self) -> None:
        """Close the old file. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _buffer(self, num_bytes: int) -> memoryview:
        """Memory of the calling thread."""
        memory = getattr(self._log.memory, "old", b"")
        if len(memory) < num_bytes:
            memory = self._log.memory.old = bytearray(num_bytes)
        return memoryview(memory)[:num_bytes]


def _changed(old: memoryview, new: memoryview) -> Iterator[tuple[int, int]]:
    """(first, end) of the runs of blocks of `new` that differ from `old`."""
    left, right = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    begun: int | None = None
    for first in range(0, len(right), BLOCK_BYTES):
        same = np.array_equal(left[first : first + BLOCK_BYTES], right[first : first + BLOCK_BYTES])
        if same and begun is not None:
            yield begun, first
            begun = None
        elif not same and begun is None:
            begun = first
    if begun is not None:
        yield begun, len(right)


def read_index(folder: Path, name: str) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    """The records of a log (`RECORD`), and the byte of its ``.blocks`` at which each run lies.

    Raises `ExportError` when it was cut off.
    """
    path, blocks = folder / f"{name}{INDEX}", folder / f"{name}{BLOCKS}"
    try:
        data, size = path.read_bytes(), blocks.stat().st_size
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
    records = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)
    ends = np.cumsum(records["length"].astype(np.int64))
    if len(data) % RECORD.itemsize or size != (ends[-1] if len(ends) else 0):
        raise ExportError(f"{blocks}: does not hold what {path.name} says; it was cut off or changed")
    return records, ends - records["length"]


class NewContent:
    """What a file will hold once the changed blocks in all logs of a folder are in place. Not thread-safe."""

    def __init__(self, path: Path, number: int, logs: Path) -> None:
        """Content of file `number`, of which `path` is the old one. Raises `ExportError` for a log that was cut off."""
        self.path, self._descriptors = path, list[int]()
        places, blocks = [np.empty((0, 4), np.int64)], list[Path]()
        for index in sorted(logs.glob(f"*{INDEX}")):
            records, positions = read_index(logs, index.stem)
            kept = records["file"] == number
            if kept.any():
                offsets, lengths = (records[name][kept].astype(np.int64) for name in ("offset", "length"))
                places.append(np.stack([offsets, lengths, positions[kept], np.full_like(offsets, len(blocks))], 1))
                blocks.append(index.with_suffix(BLOCKS))
        joined = np.concatenate(places)
        self._places = joined[np.argsort(joined[:, 0], kind="stable")]
        """Rows of offset, length, position in its log, number of the log; ordered by offset."""
        try:
            for each in (path, *blocks):
                self._descriptors.append(os.open(each, os.O_RDONLY))
        except OSError as error:
            self.close()
            raise ExportError(f"{path}: {error.strerror}") from error

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` on. Raises `ExportError` where the files are too short."""
        read_all(self._descriptors[0], offset, buffer, self.path)
        end = offset + buffer.nbytes
        first, last = np.searchsorted(self._places[:, 0], [offset, end])
        for start, length, position, source in self._places[max(first - 1, 0) : last].tolist():
            low, high = max(start, offset), min(start + length, end)
            if low < high:
                part = buffer[low - offset : high - offset]
                read_all(self._descriptors[1 + source], position + low - start, part, self.path)

    def close(self) -> None:
        """Close everything. May be called again."""
        for descriptor in self._descriptors:
            with suppress(OSError):
                os.close(descriptor)
        self._descriptors = []

    def __enter__(self) -> NewContent:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def read_all(descriptor: int, offset: int, buffer: memoryview, path: Path) -> None:
    """Fill `buffer` from byte `offset` of an open file; `ExportError` naming `path` when it is too short."""
    done = 0
    while done < buffer.nbytes:
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise ExportError(f"{path}: cannot read at {offset + done}: {error.strerror}") from error
        if count == 0:
            raise ExportError(f"{path}: ends at byte {offset + done}; it was changed meanwhile")
        done += count


def write_all(descriptor: int, offset: int, data: memoryview, path: Path) -> None:
    """Write all of `data` at byte `offset` of an open file. Raises `ExportError` naming `path`."""
    done = 0
    while done < data.nbytes:
        try:
            done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            raise write_error(path, error) from error


def sync(descriptor: int, path: Path) -> None:
    """Wait until an open file is on disk. Raises `ExportError` naming `path`."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise write_error(path, error) from error
