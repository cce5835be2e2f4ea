"""Boxes: axis-aligned regions of a tensor, and the arithmetic everything else is made of.

A box is a start and a size per dim. Chunks of a checkpoint, slices for a rank and pieces of a plan
are all boxes, so reading "only the bytes of a shard" is intersecting boxes. Pure integers: no
tensors, no numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import add, attrgetter, le, sub

from msgspec import Struct

Shape = tuple[int, ...]


class Box(Struct, frozen=True):
    """A region of a tensor; `start` is inclusive, `start + size` exclusive, in elements per dim."""

    start: Shape
    size: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box that is all of a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def num_elements(self) -> int:
        return math.prod(self.size)

    @property
    def stop(self) -> Shape:
        """Exclusive end per dim."""
        return tuple(map(add, self.start, self.size))

    def relative_to(self, origin: Shape) -> Box:
        """The same box seen from `origin`."""
        return Box(tuple(map(sub, self.start, origin)), self.size)

    def intersection(self, other: Box) -> Box | None:
        """The common region, or None when there is none."""
        start, size = [], []
        for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True):
            low = a if a > b else b
            high = a + n if a + n < b + m else b + m
            if high <= low:
                return None
            start.append(low)
            size.append(high - low)
        return Box(tuple(start), tuple(size))

    def inside(self, shape: Shape) -> bool:
        """Whether the box lies within a tensor of `shape`."""
        if len(shape) != len(self.size) or min(self.start, default=0) < 0:
            return False
        return all(map(le, map(add, self.start, self.size), shape))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(self.start, self.size, strict=True)) + "]"


def row_major_strides(shape: Sequence[int]) -> Shape:
    """Strides in elements of a contiguous tensor of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def partition_faults(boxes: Iterable[Box], shape: Shape) -> list[str]:
    """What keeps `boxes` from tiling a tensor of `shape` exactly once: outside, overlap, gap.

    Equal boxes count once per occurrence, so a duplicate is an overlap. Returns at most one message
    of each kind; an empty list means a partition. Cost: sort plus one sweep along dim 0, the pairs
    compared are only those whose rows overlap.
    """
    boxes = list(boxes)
    faults = [f"box {box} is outside the shape {list(shape)}" for box in boxes if not box.inside(shape)][:1]
    if faults:
        return faults
    overlap = first_overlap(boxes)
    if overlap:
        faults.append(f"boxes {overlap[0]} and {overlap[1]} overlap")
    covered = sum(box.num_elements for box in boxes)
    if not overlap and covered != math.prod(shape):
        faults.append(f"{math.prod(shape) - covered} of {math.prod(shape)} elements are not covered")
    return faults


def first_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None. Empty boxes share nothing."""
    live: list[Box] = []
    for box in sorted([b for b in boxes if 0 not in b.size], key=attrgetter("start")):
        if not box.start:  # scalars: every box is the same single element
            if live:
                return live[0], box
            live.append(box)
            continue
        live = [other for other in live if other.start[0] + other.size[0] > box.start[0]]
        for other in live:
            if other.intersection(box) is not None:
                return other, box
        live.append(box)
    return None


def uncovered_elements(boxes: Iterable[Box], shape: Shape) -> int:
    """How many elements of a tensor of `shape` no box touches; boxes may overlap (replicas do).

    Works on the grid that the boxes' own edges make: exact, and small for the regular cuts of
    tensor parallelism.
    """
    boxes = [box for box in boxes if box.num_elements]
    if not shape:
        return 0 if boxes else 1
    return _uncovered(boxes, shape, 0)


def _uncovered(boxes: list[Box], shape: Shape, dim: int) -> int:
    if dim == len(shape):
        return 0 if boxes else 1
    edges = sorted({0, shape[dim]} | {b.start[dim] for b in boxes} | {b.stop[dim] for b in boxes})
    total, cache = 0, dict[tuple[tuple[Shape, Shape], ...], int]()
    for low, high in pairwise(edges):
        inside = [b for b in boxes if b.start[dim] <= low and high <= b.start[dim] + b.size[dim]]
        key = tuple(sorted({(b.start[dim + 1 :], b.size[dim + 1 :]) for b in inside}))
        if key not in cache:
            cache[key] = _uncovered(inside, shape, dim + 1)
        total += (high - low) * cache[key]
    return total
