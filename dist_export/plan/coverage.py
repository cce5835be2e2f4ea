"""Which elements of the source some target takes: proves that a plan loses nothing, one file after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from msgspec import Struct, field

from dist_export.plan.recipes import Stored
from dist_export.plan.shard import ShardPlan
from dist_export.plan.work import slab_shape
from dist_export.tensors.boxes import Box, Shape, first_overlap, uncovered_elements
from dist_export.tensors.views import Slab


class _Open(Struct):
    """A slab of which some elements are not known to be taken yet."""

    shape: Shape
    boxes: set[Box] = field(default_factory=set)
    num_elements: int = 0
    """Of all boxes together, those they share counted several times."""

    def add(self, box: Box) -> bool:
        """Note a box; returns whether the slab is covered by now. Not every cover by overlapping boxes is noticed."""
        if box in self.boxes:
            return False
        self.boxes.add(box)
        self.num_elements += box.num_elements
        if self.num_elements != math.prod(self.shape):
            return False
        return first_overlap(list(self.boxes)) is None

    def missing(self) -> int:
        return uncovered_elements(self.boxes, self.shape)


class Coverage:
    """Collects what shard plans take from the source. Boxes are forgotten as soon as they cover their slab."""

    def __init__(self, shape_of: Mapping[str, tuple[Shape, str]]) -> None:
        """`shape_of`: global name -> (shape, dtype name)."""
        self._shape_of = shape_of
        self._open: dict[Slab, _Open] = {}
        self._covered: set[Slab] = set()

    def add(self, shard: ShardPlan) -> None:
        """Note everything that a shard plan takes."""
        for tensor in shard.tensors:
            if isinstance(tensor.recipe, Stored):
                continue  # of a quantiser, not of the model
            for piece in tensor.view.pieces:
                slab = piece.slab
                if slab is None or slab in self._covered:
                    continue
                size = piece.box.size[len(piece.box.size) - len(piece.source_start) :]
                if self._opened(slab).add(Box(piece.source_start, size)):
                    del self._open[slab]
                    self._covered.add(slab)

    def gaps(self, slabs: Iterator[Slab]) -> Iterator[tuple[Slab, Shape, int, bool]]:
        """(slab, shape, elements that nothing takes, whether anything takes others) of slabs with such elements."""
        for slab in slabs:
            if slab not in self._covered:
                used = self._open.get(slab)
                shape = slab_shape(slab, self._shape_of)
                missing = used.missing() if used else math.prod(shape)
                if missing:
                    yield slab, shape, missing, used is not None

    def _opened(self, slab: Slab) -> _Open:
        used = self._open.get(slab)
        if used is None:
            used = self._open[slab] = _Open(slab_shape(slab, self._shape_of))
        return used
