"""Views: a tensor described as pieces of other tensors, without any data.

A view has a shape and a list of pieces; each piece says "this box of me is that box of that source
tensor", or "this box of me is zero". Layout operations (slice, concatenate, pad, stack) turn views
into views, so a chain of them dissolves into a flat list of copies before a byte is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.tensors.boxes import Box, Shape, partition_faults


class Slab(Struct, frozen=True, order=True):
    """A source tensor with leading dims fixed: layer 3 of a stacked weight, expert 7 of layer 3.

    `name` is the tensor's global name and `prefix` the fixed leading indices; what is left is the
    slab's own shape.
    """

    name: str
    prefix: Shape = ()

    def box(self, shape: Shape) -> Box:
        """Where the slab, of its own `shape`, lies in the stored tensor."""
        return Box((*self.prefix, *(0 for _ in shape)), (*(1 for _ in self.prefix), *shape))

    def __str__(self) -> str:
        return self.name + "".join(f"[{i}]" for i in self.prefix)


class Piece(Struct, frozen=True):
    """`box` of the view equals the box of the same size at `source_start` of `slab`; zeros when `slab` is None."""

    box: Box
    slab: Slab | None
    source_start: Shape = ()

    @property
    def source_box(self) -> Box:
        """The box in the source slab. Only for pieces that have a source."""
        return Box(self.source_start, self.box.size)


class View(Struct, frozen=True):
    """A tensor of `shape` made of `pieces` that tile it."""

    shape: Shape
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, slab: Slab, shape: Shape) -> View:
        """All of a source slab."""
        return cls(shape, (Piece(Box.whole(shape), slab, (0,) * len(shape)),))

    @classmethod
    def zeros(cls, shape: Shape) -> View:
        """A tensor of zeros with no source."""
        return cls(shape, (Piece(Box.whole(shape), None),))

    def faults(self) -> list[str]:
        """Why the pieces do not tile the view exactly once; empty when they do."""
        return partition_faults((piece.box for piece in self.pieces), self.shape)

    def narrow(self, dim: int, start: int, length: int) -> View:
        """Elements ``start : start + length`` of `dim`."""
        if start < 0 or length < 0 or start + length > self.shape[dim]:
            raise ExportError(f"cannot take {start}:{start + length} of dim {dim} of shape {list(self.shape)}")
        if length == self.shape[dim]:
            return self
        kept = [_clipped(piece, dim, start, start + length) for piece in self.pieces]
        return View(_with(self.shape, dim, length), tuple([piece for piece in kept if piece is not None]))

    def gather(self, dim: int, ranges: Sequence[tuple[int, int]]) -> View:
        """The (start, length) ranges of `dim`, one after the other: a permutation, selection or replication."""
        return concatenate([self.narrow(dim, start, length) for start, length in ranges], dim)

    def pad(self, dim: int, to: int) -> View:
        """Zeros appended along `dim` until it has `to` elements."""
        missing = to - self.shape[dim]
        if missing == 0:
            return self
        return concatenate([self, View.zeros(_with(self.shape, dim, missing))], dim)


def concatenate(views: Sequence[View], dim: int) -> View:
    """Views one after the other along `dim`; the other dims must agree."""
    first, total, pieces = views[0], 0, list[Piece]()
    if len(views) == 1 and len(first.pieces) == 1:
        return first
    others = _with(first.shape, dim, 0)
    for view in views:
        if view.shape != first.shape and _with(view.shape, dim, 0) != others:
            raise ExportError(f"cannot join shapes {list(first.shape)} and {list(view.shape)} along dim {dim}")
        pieces += [_moved(piece, dim, total) for piece in view.pieces] if total else view.pieces
        total += view.shape[dim]
    return View(_with(first.shape, dim, total), tuple(_merged(pieces, dim)))


def stack(views: Sequence[View]) -> View:
    """Equal shapes stacked along a new leading dim, along which every piece has size 1."""
    shape = views[0].shape
    pieces = list[Piece]()
    for number, view in enumerate(views):
        if view.shape != shape:
            raise ExportError(f"cannot stack shapes {list(shape)} and {list(view.shape)}")
        pieces += [
            Piece(Box((number, *piece.box.start), (1, *piece.box.size)), piece.slab, piece.source_start)
            for piece in view.pieces
        ]
    return View((len(views), *shape), tuple(pieces))


def _with(shape: Shape, dim: int, value: int) -> Shape:
    return (*shape[:dim], value, *shape[dim + 1 :])


def _clipped(piece: Piece, dim: int, first: int, end: int) -> Piece | None:
    """What of a piece lies in ``first : end`` of `dim`, seen from `first`."""
    clipped = _clipped_boxes(piece.box, piece.source_start, dim, first, end)
    return None if clipped is None else Piece(clipped[0], piece.slab, clipped[1])


@lru_cache(maxsize=1 << 12)
def _clipped_boxes(box: Box, source: Shape, dim: int, first: int, end: int) -> tuple[Box, Shape] | None:
    """As `_clipped`, of a piece's place in the view and its start in the slab. Experts, and layers, are cut alike."""
    left, length = box.start[dim], box.size[dim]
    low, high = max(left, first), min(left + length, end)
    if high <= low or 0 in box.size:
        return None
    inside = Box(_with(box.start, dim, low - first), _with(box.size, dim, high - low))
    # A stacked view has one dim more than its slab: the extra leading dim has size 1 in every piece. Zeros have none.
    own = dim - (len(box.start) - len(source))
    return inside, _with(source, own, source[own] + low - left) if source and own >= 0 else source


def _moved(piece: Piece, dim: int, by: int) -> Piece:
    start = piece.box.start
    return Piece(Box(_with(start, dim, start[dim] + by), piece.box.size), piece.slab, piece.source_start)


def _merged(pieces: list[Piece], dim: int) -> list[Piece]:
    """Neighbours along `dim` that are neighbours in the source too become one piece."""
    merged: list[Piece] = []
    for piece in pieces:
        joined = _joined(merged[-1], piece, dim) if merged else None
        if joined is not None:
            merged[-1] = joined
        else:
            merged.append(piece)
    return merged


def _joined(left: Piece, right: Piece, dim: int) -> Piece | None:
    if left.slab != right.slab:
        return None
    start, size, source = left.box.start, left.box.size, left.source_start
    length = size[dim]
    if _with(start, dim, start[dim] + length) != right.box.start:
        return None
    if _with(size, dim, 0) != _with(right.box.size, dim, 0):
        return None
    if left.slab is not None:
        own = dim - (len(start) - len(source))
        if own < 0 or _with(source, own, source[own] + length) != right.source_start:
            return None
    return Piece(Box(start, _with(size, dim, length + right.box.size[dim])), left.slab, source)
