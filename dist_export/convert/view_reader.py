"""Small reads outside the stream of tiles: whole views of quantisers' tensors, and rows of them beside a tile."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from dist_export.convert.low_rank import LowRankMerger
from dist_export.convert.numpy_arithmetic import Float32, to_float32
from dist_export.convert.sources import SourceFiles, SourceRectangle
from dist_export.convert.tiles import Tile
from dist_export.models.low_rank import Updates
from dist_export.models.quantization import stored_blocks
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.work import Rectangle, WorkItem, flat_rectangle, flat_shape, slab_shape
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import DType, dtype_by_name
from dist_export.tensors.views import Piece, Slab, View

KEPT_BYTES, MOST_KEPT = 128 << 10, 16
Raw = npt.NDArray[Any]
"""[rows, columns] of unsigned integers of the element's size."""


class ViewReader(Struct, frozen=True):
    """Reads rectangles of source tensors. Thread-safe as its source is."""

    sources: SourceFiles
    shape_of: Mapping[str, tuple[Shape, str]]
    """Global name -> (shape, dtype name)."""
    updates: Updates = field(default_factory=dict)
    """What adapters add to slabs: `row_blocks` gives them merged."""
    measured: Mapping[str, Float32] = field(default_factory=dict)
    """Slabs that are in no file: the amax of rows (`dist_export.models.quantization.row_slab`)."""
    _kept: OrderedDict[tuple[View, tuple[int, int] | None], Float32] = field(default_factory=OrderedDict)
    """Small views read last: factors of columns are wanted again for every tile of a weight."""
    _lock: Lock = field(default_factory=Lock)

    def rows(self, view: View, dtype: DType, rows: tuple[int, int] | None = None) -> Raw:
        """Rows of a view taken as a matrix ``[rows, last dim]`` (all of them by default), raw."""
        num_rows, width = flat_shape(view.shape)
        first, end = rows or (0, num_rows)
        result = np.zeros((end - first, width), f"u{dtype.itemsize}")
        for piece in view.pieces:
            top, bottom, left, right = flat_rectangle(piece.box, view.shape)
            low, high = max(top, first), min(bottom, end)
            if piece.slab is not None and low < high:
                result[low - first : high - first, left:right] = self._piece(piece, dtype, (low - top, high - top))
        return result

    def values(self, view: View, dtype: DType, rows: tuple[int, int] | None = None) -> Float32:
        """The same as float32, which holds every value of narrower types. Not to be changed."""
        key = (view, rows)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        values = to_float32(self.rows(view, dtype, rows), dtype)
        if values.nbytes <= KEPT_BYTES:
            with self._lock:
                self._kept[key] = values
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
        return values

    def tensor(self, tensor: SourceTensor) -> Float32:
        """All of a small tensor as float32 ``[rows, columns]``."""
        return self.values(View.of(tensor.slab, tensor.shape), dtype_by_name(tensor.dtype))

    def row_blocks(self, tensor: SourceTensor, num_bytes: int) -> Iterator[Raw]:
        """A tensor from top to bottom, about `num_bytes` of it at a time, raw."""
        dtype, view = dtype_by_name(tensor.dtype), View.of(tensor.slab, tensor.shape)
        num_rows, width = flat_shape(tensor.shape)
        step = max(num_bytes // (width * dtype.itemsize), 1)
        merger, update = LowRankMerger(self.sources), self.updates.get(tensor.slab)
        for first in range(0, num_rows, step):
            rows = (first, min(first + step, num_rows))
            raw = self.rows(view, dtype, rows)
            if update is not None:
                item = WorkItem(tensor.slab, tensor.shape, dtype, rows, (), update)
                merger.merge(Tile(item, rows, (), ()), [(0, raw)])
            yield raw

    def _piece(self, piece: Piece, dtype: DType, rows: tuple[int, int]) -> Raw:
        """Some of the rows of a piece."""
        assert piece.slab is not None
        if piece.slab.name in self.measured:
            first = piece.source_start[0]
            return self.measured[piece.slab.name][first + rows[0] : first + rows[1]].reshape(-1, 1).view(np.uint32)
        if (found := stored_blocks(piece.slab)) is not None:
            first, left = piece.source_start
            wanted = (first + rows[0], first + rows[1], left, left + piece.box.size[-1])
            return self._blocks(*found, dtype, wanted)
        shape = slab_shape(piece.slab, self.shape_of)
        size = piece.box.size[len(piece.box.size) - len(shape) :]
        source = type(piece.box)(piece.source_start, size)
        top, _, left, right = flat_rectangle(source, shape)
        return self.rectangle(piece.slab, shape, dtype, (top + rows[0], top + rows[1], left, right))

    def _blocks(self, slab: Slab, blocks: int, dtype: DType, wanted: Rectangle) -> Raw:
        """Scales of rows and columns of blocks, stored as `block_slab` says."""
        top, bottom, left, right = wanted
        shape = slab_shape(slab, self.shape_of)
        shape = shape if len(shape) == 2 else (shape[0], 1)
        parts = []
        for rank in range(left // blocks, -(-right // blocks)):
            column = self.rectangle(slab, shape, dtype, (top * blocks, bottom * blocks, rank, rank + 1))
            first, end = max(left - rank * blocks, 0), min(right - rank * blocks, blocks)
            parts.append(column.reshape(bottom - top, blocks)[:, first:end])
        return np.concatenate(parts, axis=1)

    def rectangle(self, slab: Slab, shape: Shape, dtype: DType, wanted: Rectangle) -> Raw:
        """Some rows and columns of a slab of this shape, raw."""
        top, bottom, left, right = wanted
        result = np.zeros((bottom - top, right - left), f"u{dtype.itemsize}")
        for part in self.sources.rectangles(slab, shape, dtype, needed=[wanted]):
            low, high = max(top, part.rows[0]), min(bottom, part.rows[1])
            first, end = max(left, part.columns[0]), min(right, part.columns[1])
            block = self._read(part, dtype, (low, high, first, end))
            result[low - top : high - top, first - left : end - left] = block
        return result

    def _read(self, part: SourceRectangle, dtype: DType, wanted: Rectangle) -> Raw:
        """A rectangle within one chunk, in one read from its first to its last element."""
        low, high, first, end = wanted
        steps = (part.row_stride, part.column_stride)
        offset = part.offset + (low - part.rows[0]) * steps[0] + (first - part.columns[0]) * steps[1]
        num_bytes = (high - low - 1) * steps[0] + (end - first - 1) * steps[1] + dtype.itemsize
        memory = np.empty(num_bytes, np.uint8)
        self.sources.read_into(part.file, offset, memory.data)
        block: Raw = np.ndarray((high - low, end - first), f"u{dtype.itemsize}", memory.data, strides=steps)
        return block
