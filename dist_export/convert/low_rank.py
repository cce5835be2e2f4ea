"""Merges adapters into tiles, as `dist_export.models.low_rank` defines it, before anything else is done with them.

Plain numpy loops over the rank, in blocks that stay in the processor's cache: no library product is used, since the
order in which it sums depends on the shapes of the tile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dist_export.convert.numpy_arithmetic import Float32, from_float32, to_float32
from dist_export.convert.sources import SourceFiles, SourceRectangle
from dist_export.errors import ExportError
from dist_export.models.low_rank import LowRankTerm
from dist_export.models.source_tensor import SourceTensor
from dist_export.tensors.dtypes import DType, dtype_by_name
from dist_export.tensors.views import Slab

if TYPE_CHECKING:
    from dist_export.convert.tiles import Tile

Block = npt.NDArray[Any]
BLOCK_COLUMNS, BLOCK_ELEMENTS = 4096, 1 << 15
KEPT_BYTES = 32 << 20
"""Of matrices A in float32 that a process keeps, but at least one: consecutive tiles mostly need the same."""


class LowRankMerger:
    """Adds the updates of a process's tiles. Thread-safe; holds a few matrices A."""

    def __init__(self, sources: SourceFiles) -> None:
        self._sources = sources
        self._kept: OrderedDict[Slab, Float32] = OrderedDict()
        self._lock = Lock()

    def merge(self, tile: Tile, parts: Sequence[tuple[int, Block]]) -> int:
        """Merge into what was read of a tile, in place: (first column, raw elements of the tile's rows) per read.

        Returns the bytes read for it. Raises `ExportError` when a finite value becomes too large for the element type.
        """
        update, num_bytes = tile.item.update, 0
        assert update is not None, f"{tile.item.slab} has no update"
        for term in update.within(tile.rows):
            a, read = self._whole(term.a)
            b = to_float32(*_read_rows(self._sources, term.b, (term.b_row, term.b_row + term.rows[1] - term.rows[0])))
            num_bytes += read + b.size * dtype_by_name(term.b.dtype).itemsize
            rows = slice(term.rows[0] - tile.rows[0], term.rows[1] - tile.rows[0])
            for first, block in parts:
                columns = a[:, first : first + block.shape[1]]
                _merge_block(block[rows], b, columns, term=term, dtype=tile.item.dtype, slab=tile.item.slab)
        return num_bytes

    def _whole(self, tensor: SourceTensor) -> tuple[Float32, int]:
        """(a matrix A, bytes read for it)"""
        with self._lock:
            kept = self._kept.pop(tensor.slab, None)
            if kept is not None:
                self._kept[tensor.slab] = kept
                return kept, 0
        raw, dtype = _read_rows(self._sources, tensor, (0, tensor.shape[0]))
        values = to_float32(raw, dtype)
        with self._lock:
            self._kept[tensor.slab] = values
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return values, raw.nbytes


def _merge_block(block: Block, b: Float32, a: Float32, *, term: LowRankTerm, dtype: DType, slab: Slab) -> None:
    """``block`` [rows, columns] raw, `b` [rows, rank], `a` [rank, columns]."""
    factor = np.float32(term.factor)
    for left in range(0, block.shape[1], BLOCK_COLUMNS):
        columns = slice(left, min(left + BLOCK_COLUMNS, block.shape[1]))
        step = max(BLOCK_ELEMENTS // (columns.stop - left), 1)
        for top in range(0, block.shape[0], step):
            part, rows = block[top : top + step, columns], b[top : top + step]
            total = np.multiply(rows[:, 0, None], a[0, columns])
            product = np.empty_like(total)
            for k in range(1, term.rank):
                np.multiply(rows[:, k, None], a[k, columns], out=product)
                np.add(total, product, out=total)
            np.multiply(total, factor, out=total)
            base = to_float32(np.ascontiguousarray(part), dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                merged = np.add(base, total, out=total)
            stored = from_float32(merged, dtype)
            lost = np.isfinite(base) & ~np.isfinite(to_float32(stored, dtype))
            if lost.any():
                raise ExportError(
                    f"{slab}: {int(lost.sum())} elements become too large for {dtype} when {term.b.slab} is merged"
                )
            part[...] = stored


def _read_rows(sources: SourceFiles, tensor: SourceTensor, rows: tuple[int, int]) -> tuple[Block, DType]:
    """(raw elements [rows, columns] of a matrix, their type)"""
    dtype = dtype_by_name(tensor.dtype, where=tensor.slab.name)
    needed = [(*rows, 0, tensor.shape[1])]
    whole: Block = np.empty((rows[1] - rows[0], tensor.shape[1]), f"u{dtype.itemsize}")
    for rectangle in sources.rectangles(tensor.slab, tensor.shape, dtype, needed=needed):
        first, end = max(rows[0], rectangle.rows[0]), min(rows[1], rectangle.rows[1])
        part = whole[first - rows[0] : end - rows[0], rectangle.columns[0] : rectangle.columns[1]]
        for place, offset in _lines(rectangle, first - rectangle.rows[0], part):
            line = np.empty(place.shape, place.dtype)
            sources.read_into(rectangle.file, offset, line.data.cast("B"))
            place[...] = line
    return whole, dtype


def _lines(rectangle: SourceRectangle, skipped: int, part: Block) -> Iterator[tuple[Block, int]]:
    """(where it goes, offset in the file) of what lies together: all of `part`, its rows, or its columns."""
    (num_rows, num_columns), itemsize = part.shape, part.itemsize
    start = rectangle.offset + skipped * rectangle.row_stride
    if rectangle.column_stride != itemsize and num_columns > 1:
        for column in range(num_columns):
            yield part[:, column], start + column * rectangle.column_stride
    elif num_rows == 1 or rectangle.row_stride == num_columns * itemsize:
        yield part, start
    else:
        for row in range(num_rows):
            yield part[row], start + row * rectangle.row_stride
