"""Output files: created at full size with their header, written at final offsets, pushed to disk early."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Protocol

from dist_export.errors import ExportError

WRITE_BACK_BYTES = 1 << 20  # bytes written to a file before its write-back is started: small steps keep the disk busy
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: start write-out, do not wait


class WritableFile(Protocol):
    """What the executor needs of an output file."""

    num_bytes_written: int

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write contiguous bytes at a byte offset. Thread-safe."""


class OutputFile:
    """One file of the staged export. Several threads and processes may write disjoint ranges of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes_written = 0
        self._lock = Lock()
        self._pending: list[tuple[int, int]] = []
        self._pending_bytes = 0
        try:
            self._descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise write_error(path, error) from error

    @staticmethod
    def create(path: Path, header: bytes, num_data_bytes: int) -> None:
        """Create a file of its final size that holds only its header. Called by the process that owns it."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                _allocate(descriptor, len(header) + num_data_bytes)
                os.pwrite(descriptor, header, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_error(path, error) from error

    @staticmethod
    def restore(path: Path, header: bytes, num_data_bytes: int) -> None:
        """Make a file that an earlier run began ready to go on: its size and header, whatever became of them."""
        try:
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.ftruncate(descriptor, len(header) + num_data_bytes)
                _allocate(descriptor, len(header) + num_data_bytes)
                os.pwrite(descriptor, header, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_error(path, error) from error

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of `data`; `ExportError` says what the disk said."""
        try:
            done, size = os.pwrite(self._descriptor, data, offset), data.nbytes
            while done < size:
                done += os.pwrite(self._descriptor, data[done:], offset + done)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._start_write_back(offset, size)

    def read(self, offset: int, length: int, buffer: memoryview) -> Iterator[memoryview]:
        """Up to `length` bytes from `offset`, in parts that lie in `buffer`; fewer where the file is shorter."""
        while length > 0:
            try:
                count = os.preadv(self._descriptor, [buffer[: min(length, buffer.nbytes)]], offset)
            except OSError as error:
                raise ExportError(f"{self.path}: cannot read: {error.strerror}") from error
            if count == 0:
                return
            yield buffer[:count]
            offset, length = offset + count, length - count

    def finish(self) -> None:
        """Wait until everything is on disk and close. Errors of earlier write-backs appear here."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close without waiting for the disk. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _start_write_back(self, offset: int, num_bytes: int) -> None:
        """Without this most of an export's time is the wait for the disk at its end."""
        with self._lock:
            self.num_bytes_written += num_bytes
            self._pending.append((offset, num_bytes))
            self._pending_bytes += num_bytes
            if self._pending_bytes < WRITE_BACK_BYTES:
                return
            ranges, self._pending, self._pending_bytes = self._pending, [], 0
        sync_file_range = _sync_file_range()
        for start, length in ranges:
            if sync_file_range is not None:
                sync_file_range(self._descriptor, start, length, SYNC_FILE_RANGE_WRITE)


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the space, so that a full disk is known before the work; where that is not offered, set the size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def write_error(path: Path, error: OSError) -> ExportError:
    """A failed write as the user should see it."""
    hint = {
        errno.ENOSPC: "the disk is full; free space or choose another output",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "no permission to write there",
    }.get(error.errno or 0, error.strerror or str(error))
    return ExportError(f"{path}: cannot write: {hint}")


@cache
def _sync_file_range():  # type: ignore[no-untyped-def]
    """Linux's sync_file_range, which Python does not offer; None where the C library has none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
