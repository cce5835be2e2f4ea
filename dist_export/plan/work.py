"""From plans to work: which rows of which source tensors are read, and where every part of them goes.

Plans are made per target file; work is done per source tensor. Turning one into the other is what lets
a row be read once and cut for every target that needs a part of it. Everything here is two-dimensional:
a tensor is rows x width with the last dim as width, so a norm is one row and a weight ``[out, in]`` has
``out`` rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.models.low_rank import LowRankUpdate, Updates
from dist_export.models.quantization import is_row_slab
from dist_export.plan.recipes import Absorbed, Encoded, Factors, Folded, Stored, StoredScales
from dist_export.plan.shard import PlannedTensor, ShardPlan
from dist_export.tensors.boxes import Box, Shape
from dist_export.tensors.dtypes import DType
from dist_export.tensors.views import Piece, Slab, View

Rectangle = tuple[int, int, int, int]
"""First row, row end (exclusive), first column, column end (exclusive)."""


class OutputTensor(Struct, frozen=True):
    """A planned tensor in one of the run's output files."""

    file: int
    """Number of the shard plan in the run."""
    index: int
    """Number of the tensor in its shard plan."""
    planned: PlannedTensor
    data_start: int  # bytes: length of the file's header

    @property
    def key(self) -> tuple[int, int]:
        """(file, index)."""
        return self.file, self.index

    @property
    def width(self) -> int:
        """Elements per row, before a transposition."""
        shape = self.planned.view.shape
        return shape[-1] if shape else 1

    @property
    def offset(self) -> int:
        """Bytes from the start of the file."""
        return self.data_start + self.planned.offset


class Use(Struct, frozen=True):
    """A rectangle of a source slab and the place in an output tensor that it fills."""

    source: Rectangle
    output: OutputTensor
    row: int
    """First row in the output tensor."""
    column: int
    """First column in the output tensor."""

    @property
    def num_bytes(self) -> int:
        """Source bytes."""
        top, bottom, left, right = self.source
        return (bottom - top) * (right - left) * self.output.planned.source_dtype.itemsize

    def num_scale_bytes(self, rows: tuple[int, int]) -> int:
        """Bytes of quantisers' tensors that codes of those source rows need beside the weights."""
        recipe = self.output.planned.recipe
        if not isinstance(recipe, Encoded):
            return 0
        top, bottom, left, right = _clipped(self.source, rows)
        total, scales = 0, recipe.scales
        if isinstance(scales, StoredScales) and not _is_measured(scales.view):
            size = self.output.width // scales.view.shape[-1]  # columns per scale
            total += (bottom - top) * -(-(right - left) // size) * scales.dtype.itemsize
        elif isinstance(scales, Factors):
            total += (right - left) * scales.dtype.itemsize
        if recipe.smoothing is not None:
            total += (right - left) * recipe.smoothing.dtype.itemsize
        return total

    def num_bytes_written(self, rows: tuple[int, int]) -> int:
        """Target bytes made of those source rows."""
        down, across = self.output.planned.packing
        return _area(_clipped(self.source, rows)) // (down * across) * self.output.planned.dtype.itemsize


class Fill(Struct, frozen=True):
    """`num_elements` of an output tensor from element `first` on that no tile makes: zeros, or a small tensor."""

    output: OutputTensor
    first: int
    num_elements: int

    @property
    def num_bytes_written(self) -> int:
        return self.num_elements * self.output.planned.dtype.itemsize

    @property
    def num_bytes_needed(self) -> int:
        """Source bytes that a small tensor is made of; zeros need none."""
        planned = self.output.planned
        recipe = planned.recipe
        if isinstance(recipe, Stored):
            times = recipe.times
            return _view_bytes(recipe.view, recipe.dtype) + (_view_bytes(times.view, times.dtype) if times else 0)
        if isinstance(recipe, Absorbed):
            return _view_bytes(planned.view, planned.source_dtype) + _view_bytes(recipe.keys, recipe.keys_dtype)
        if isinstance(recipe, Folded):
            return _view_bytes(planned.view, planned.source_dtype) + _view_bytes(recipe.factor, recipe.factor_dtype)
        return 0


class WorkItem(Struct, frozen=True):
    """Some rows of one source slab with everything that is made of them. `rows` is (first, end)."""

    slab: Slab
    shape: Shape
    dtype: DType
    rows: tuple[int, int]
    uses: tuple[Use, ...]
    update: LowRankUpdate | None = None
    """What adapters add to the slab before anything else is done."""

    @property
    def num_bytes_needed(self) -> int:
        """Source bytes that some use needs, each counted once, and those of adapters and of scales beside them."""
        adapters = self.update.num_bytes(self.rows) if self.update else 0
        scales = sum(use.num_scale_bytes(self.rows) for use in self.uses)
        return _union_area([self.needed(use) for use in self.uses]) * self.dtype.itemsize + adapters + scales

    def needed(self, use: Use) -> Rectangle:
        """The part of a use that lies in these rows."""
        return _clipped(use.source, self.rows)

    @property
    def num_bytes_written(self) -> int:
        return sum(use.num_bytes_written(self.rows) for use in self.uses)

    @property
    def row_step(self) -> int:
        """Rows that may not be torn apart, since some use stores them in one byte."""
        return max([use.output.planned.packing[0] for use in self.uses])


def _view_bytes(view: View, dtype: DType) -> int:
    found = (piece for piece in view.pieces if piece.slab is not None and not is_row_slab(piece.slab))
    return sum(piece.box.num_elements for piece in found) * dtype.itemsize


def _is_measured(view: View) -> bool:
    """Whether scales are in no file, but measured on the weights before anything is written."""
    return any(piece.slab is not None and is_row_slab(piece.slab) for piece in view.pieces)


def flat_shape(shape: Shape) -> tuple[int, int]:
    """(rows, width) of a tensor."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def flat_rectangle(box: Box, shape: Shape) -> Rectangle:
    """`box` of a tensor of `shape` as a rectangle. Boxes of plans are whole rows of all but the last two dims."""
    if not shape:
        return 0, 1, 0, 1
    first, rows = 0, 1
    for dim in range(len(shape) - 1):
        assert rows == 1 or (box.start[dim], box.size[dim]) == (0, shape[dim]), f"{box} is no rectangle of {shape}"
        first, rows = first * shape[dim] + box.start[dim], rows * box.size[dim]
    return first, first + rows, box.start[-1], box.start[-1] + box.size[-1]


class SlabUses(Struct, frozen=True):
    """A source slab and every use of it in the run, by output file."""

    slab: Slab
    shape: Shape
    dtype: DType
    uses: tuple[Use, ...]
    update: LowRankUpdate | None = None

    def item(self, uses: Iterable[Use], rows: tuple[int, int] | None = None) -> WorkItem:
        """Some of the uses as work: over the rows they need, or the part of them within `rows`."""
        kept = tuple(uses)
        first = min([use.source[0] for use in kept])
        end = max([use.source[1] for use in kept])
        if rows is not None:
            first, end = max(first, rows[0]), min(end, rows[1])
        return WorkItem(self.slab, self.shape, self.dtype, (first, end), kept, self.update)


def collect_uses(
    plans: Mapping[int, ShardPlan], shape_of: Mapping[str, tuple[Shape, str]], *, updates: Updates | None = None
) -> tuple[list[SlabUses], list[Fill]]:
    """Every source slab of `plans` (output file number -> plan) with its uses, and the zeros to write.

    `updates` are what adapters add to slabs.
    """
    uses: dict[Slab, list[Use]] = defaultdict(list)
    fills: list[Fill] = []
    dtypes: dict[Slab, DType] = {}
    for file, plan in plans.items():
        data_start = len(plan.header)
        for index, planned in enumerate(plan.tensors):
            output = OutputTensor(file, index, planned, data_start)
            if planned.is_permuted:
                _refuse_updates(planned, updates or {})
            if planned.is_small or planned.is_permuted:
                fills.append(Fill(output, 0, math.prod(planned.shape)))
                continue
            for piece in planned.view.pieces:
                if piece.slab is None:
                    fills += _fills(output, piece)
                elif piece.box.num_elements:
                    shape = slab_shape(piece.slab, shape_of)
                    uses[piece.slab].append(_use(output, piece, shape))
                    dtypes[piece.slab] = planned.source_dtype
    added = updates or {}
    slabs = [
        SlabUses(slab, slab_shape(slab, shape_of), dtypes[slab], tuple(u), added.get(slab)) for slab, u in uses.items()
    ]
    return slabs, fills


def _refuse_updates(planned: PlannedTensor, updates: Updates) -> None:
    views = (planned.view, planned.recipe.keys) if isinstance(planned.recipe, Absorbed) else (planned.view,)
    if any(piece.slab in updates for view in views for piece in view.pieces if piece.slab is not None):
        raise ExportError(f"{planned.name}: an adapter cannot be merged into a tensor of this order; merge it before")


def slab_shape(slab: Slab, shape_of: Mapping[str, tuple[Shape, str]]) -> Shape:
    """The shape of a slab: that of its tensor less the fixed leading dims."""
    return shape_of[slab.name][0][len(slab.prefix) :]


def _use(output: OutputTensor, piece: Piece, shape: Shape) -> Use:
    # A stacked output has one dim more than its source: drop the leading ones, which have size 1.
    size = piece.box.size[len(piece.box.size) - len(shape) :]
    row, _, column, _ = flat_rectangle(piece.box, output.planned.view.shape)
    return Use(flat_rectangle(Box(piece.source_start, size), shape), output, row, column)


def _fills(output: OutputTensor, piece: Piece) -> list[Fill]:
    top, bottom, left, right = flat_rectangle(piece.box, output.planned.view.shape)
    width = output.width
    if output.planned.transposed:
        (top, bottom, left, right), width = (left, right, top, bottom), output.planned.shape[-1]
    if right - left == width:
        return [Fill(output, top * width, (bottom - top) * width)]
    return [Fill(output, row * width + left, right - left) for row in range(top, bottom)]


def _clipped(rectangle: Rectangle, rows: tuple[int, int]) -> Rectangle:
    top, bottom, left, right = rectangle
    return max(top, rows[0]), max(min(bottom, rows[1]), max(top, rows[0])), left, right


def _area(rectangle: Rectangle) -> int:
    top, bottom, left, right = rectangle
    return (bottom - top) * (right - left)


def _union_area(rectangles: Sequence[Rectangle]) -> int:
    """Elements covered by at least one rectangle."""
    ordered = sorted(rectangles)
    if all(upper[1] <= lower[0] for upper, lower in pairwise(ordered)):
        return sum(map(_area, ordered))
    edges = sorted({edge for r in rectangles for edge in r[:2]})
    total = 0
    for top, bottom in pairwise(edges):
        spans = sorted((r[2], r[3]) for r in rectangles if r[0] <= top and bottom <= r[1])
        covered, end = 0, -1
        for left, right in spans:
            covered += max(right - max(left, end), 0)
            end = max(end, right)
        total += covered * (bottom - top)
    return total
