"""Source files: open descriptors, and where the bytes of a chunk really lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from msgspec import Struct

from dist_export.checkpoint.index import CheckpointIndex, Chunk
from dist_export.checkpoint.torch_save import read_record
from dist_export.errors import ExportError
from dist_export.plan.work import Rectangle
from dist_export.tensors.boxes import Box, Shape, row_major_strides
from dist_export.tensors.dtypes import DType
from dist_export.tensors.views import Slab

GIVE_BACK_BYTES = 64 << 10  # smaller reads share pages with their neighbours and cost a call each
MAX_OPEN_FILES = 128  # descriptors kept open per process; a checkpoint can have thousands of files
MAX_HEADS = 512  # kept per process, of less than 4 KiB each
MAX_HEAD_BYTES = 4096


class SourceRectangle(Struct, frozen=True):
    """A chunk's part of a slab: rows x columns of elements at byte strides from `offset` of a file."""

    file: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    offset: int  # bytes: element (rows[0], columns[0])
    row_stride: int  # bytes
    column_stride: int  # bytes


class _Head(Struct, frozen=True):
    """The bytes of a record before its data, and where those of its tensor lie."""

    data: bytes
    offset: int  # bytes from the start of the record to element 0
    strides: Shape  # in bytes


class SourceFiles:
    """Reads the files of one checkpoint. Thread-safe; counts every byte read.

    A large checkpoint would push everything else out of the page cache although each byte is needed once:
    with `give_back` the cache is told so behind every read.
    """

    def __init__(self, index: CheckpointIndex, *, give_back: bool = False) -> None:
        self.index = index
        self._give_back = give_back
        self.num_bytes_read = 0
        self._opened: dict[int, _Opened] = {}
        self._lock = Lock()
        self._closes_none = len(index.files) <= MAX_OPEN_FILES
        self._located: dict[tuple[int, int], tuple[int, Shape]] = {}
        self._heads: dict[tuple[int, Shape, str], _Head] = {}

    def close(self) -> None:
        """Close every descriptor."""
        with self._lock:
            for opened in self._opened.values():
                os.close(opened.descriptor)
            self._opened.clear()

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of a file; `ExportError` when the file ends before, naming it."""
        descriptor = self._take(file)
        try:
            done = self._read_some(descriptor, file, offset, buffer)
            while done < buffer.nbytes:
                count = self._read_some(descriptor, file, offset + done, buffer[done:])
                if count == 0:
                    raise ExportError(
                        f"{self.index.path(file)}: ends at byte {offset + done}, needed up to "
                        f"{offset + buffer.nbytes}; it was cut short while the export ran"
                    )
                done += count
            if self._give_back and done >= GIVE_BACK_BYTES:
                os.posix_fadvise(descriptor, offset, done, os.POSIX_FADV_DONTNEED)
        finally:
            self._release(file)
        with self._lock:
            self.num_bytes_read += done

    def read_at(self, file: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset` (fewer at the end of the file)."""
        descriptor = self._take(file)
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise self._read_error(file, offset, error) from error
        finally:
            self._release(file)
        with self._lock:
            self.num_bytes_read += len(data)
        return data

    def _read_some(self, descriptor: int, file: int, offset: int, buffer: memoryview) -> int:
        try:
            return os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            raise self._read_error(file, offset, error) from error

    def _read_error(self, file: int, offset: int, error: OSError) -> ExportError:
        return ExportError(f"{self.index.path(file)}: cannot read at {offset}: {error.strerror}")

    def rectangles(
        self, slab: Slab, shape: Shape, dtype: DType, *, needed: Sequence[Rectangle] | None = None
    ) -> list[SourceRectangle]:
        """Where the slab's chunks lie, in order of rows: those that share an element with `needed` (None: all).

        Reads the heads of their records once: of no others, since with many processes heads would otherwise
        be read as often as there are processes. Raises `ExportError` when a record is not the tensor that the
        metadata promises.
        """
        found = [self.rectangle(slab, chunk, common, dtype) for chunk, common in self.chunks_of(slab, shape, needed)]
        return sorted(found, key=lambda r: (r.rows, r.columns))

    def chunks_of(
        self, slab: Slab, shape: Shape, needed: Sequence[Rectangle] | None = None
    ) -> list[tuple[Chunk, Box]]:
        """The slab's chunks and the part of each that lies in it: those that share an element with `needed`."""
        box = Box((*slab.prefix, *(0 for _ in shape)), (*(1 for _ in slab.prefix), *shape))
        chunks = [(chunk, _common(chunk, box)) for chunk in self.index.chunks(slab.name, box)]
        if needed is None:
            return chunks
        fixed = len(slab.prefix)
        return [(chunk, common) for chunk, common in chunks if _is_needed(common, fixed, needed)]

    def rectangle(self, slab: Slab, chunk: Chunk, common: Box, dtype: DType) -> SourceRectangle:
        """The part `common` of a chunk, which lies within the slab. May read the head of the chunk's record."""
        offset, strides = self._locate(slab, chunk, dtype)
        start = common.relative_to(chunk.box.start).start
        offset += sum(a * step for a, step in zip(start, strides, strict=True))
        fixed = len(slab.prefix)
        steps = strides[fixed:]
        rows, columns = _rows_and_columns(common, fixed)
        row_stride = steps[0] if len(steps) == 2 else dtype.itemsize * (columns[1] - columns[0])
        return SourceRectangle(chunk.file, rows, columns, offset, row_stride, steps[-1] if steps else dtype.itemsize)

    def _locate(self, slab: Slab, chunk: Chunk, dtype: DType) -> tuple[int, Shape]:
        """(byte offset of the chunk's first element, strides in bytes)."""
        if chunk.strides is not None:
            return chunk.offset, chunk.strides
        if not self.index.chunks_are_records:
            return chunk.offset, tuple(s * dtype.itemsize for s in row_major_strides(chunk.box.size))
        key = (chunk.file, chunk.offset)
        if key not in self._located:
            self._located[key] = self._find_record(slab, chunk, dtype)
        return self._located[key]

    def _find_record(self, slab: Slab, chunk: Chunk, dtype: DType) -> tuple[int, Shape]:
        """As `_locate`, from the file. What precedes the data of a record, its pickle included, depends only on the
        record's length, shape and element type: one with the bytes of another that was read is like that one."""
        kind = (chunk.length, chunk.box.size, dtype.name)
        known = self._heads.get(kind)
        if known is not None and self.read_at(chunk.file, chunk.offset, len(known.data)) == known.data:
            return chunk.offset + known.offset, known.strides
        offset, strides = self._read_head(slab, chunk, dtype)
        ahead = offset - chunk.offset
        if ahead <= MAX_HEAD_BYTES and len(self._heads) < MAX_HEADS:
            self._heads[kind] = _Head(self.read_at(chunk.file, chunk.offset, ahead), ahead, strides)
        return offset, strides

    def _read_head(self, slab: Slab, chunk: Chunk, dtype: DType) -> tuple[int, Shape]:
        path = self.index.path(chunk.file)
        record = read_record(
            lambda at, size: self.read_at(chunk.file, at, size), chunk.offset, chunk.length, origin=str(path)
        )
        if record.dtype != dtype.name or tuple(record.shape) != chunk.box.size:
            raise ExportError(
                f"{path}: the record of {slab.name} {chunk.box} at byte {chunk.offset} holds {record.dtype} "
                f"{list(record.shape)}, expected {dtype} {list(chunk.box.size)}"
            )
        # The step along a dim of one element means nothing, and torch leaves any number there.
        steps = (step if size > 1 else 1 for step, size in zip(record.strides, record.shape, strict=True))
        strides = tuple(step * dtype.itemsize for step in steps)
        if not _rows_or_columns_lie_together(chunk.box.size[-2:], strides[-2:], dtype.itemsize):
            raise ExportError(
                f"{path}: the record of {slab.name} {chunk.box} at byte {chunk.offset} has shape {list(record.shape)} "
                f"and strides {list(record.strides)}: neither its rows nor its columns are contiguous; save it again"
            )
        return record.offset, strides

    def _take(self, file: int) -> int:
        """An open descriptor of a file, kept from being closed until `_release`."""
        opened = self._opened.get(file)
        if opened is not None and self._closes_none:
            return opened.descriptor
        with self._lock:
            opened = self._opened.get(file) or _Opened(_open(self.index.path(file)))
            if not self._closes_none:
                self._opened.pop(file, None)
            self._opened[file] = opened  # last in order: most recently used
            opened.users += 1
            self._close_unused()
        return opened.descriptor

    def _release(self, file: int) -> None:
        if not self._closes_none:
            with self._lock:
                self._opened[file].users -= 1

    def _close_unused(self) -> None:
        """Close the files used longest ago, down to the limit. Called with the lock held."""
        excess = len(self._opened) - MAX_OPEN_FILES
        for file in [file for file, opened in self._opened.items() if opened.users == 0][: max(excess, 0)]:
            os.close(self._opened.pop(file).descriptor)


def _common(chunk: Chunk, box: Box) -> Box:
    common = chunk.box.intersection(box)
    assert common is not None, f"{chunk.box} was said to touch {box}"
    return common


def _rows_and_columns(box: Box, fixed: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """A box without its first `fixed` dims as (first row, end) and (first column, end)."""
    start, stop = box.start[fixed:], box.stop[fixed:]
    assert len(start) <= 2, f"{box} has {len(start)} dims"
    columns = (start[-1], stop[-1]) if start else (0, 1)
    return ((start[0], stop[0]) if len(start) == 2 else (0, 1)), columns


def _is_needed(box: Box, fixed: int, needed: Sequence[Rectangle]) -> bool:
    (top, bottom), (left, right) = _rows_and_columns(box, fixed)
    return any(n[0] < bottom and top < n[1] and n[2] < right and left < n[3] for n in needed)


def _rows_or_columns_lie_together(size: Shape, strides: Shape, itemsize: int) -> bool:
    """Whether a matrix (or vector) is stored row by row or column by column, which is all that tiles can read."""
    if len(size) < 2:
        return True
    (num_rows, num_columns), (down, across) = size, strides
    by_rows = across == itemsize and (num_rows == 1 or down >= num_columns * itemsize)
    by_columns = down == itemsize and (num_columns == 1 or across >= num_rows * itemsize)
    return by_rows or by_columns


class _Opened(Struct):
    descriptor: int
    users: int = 0


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
