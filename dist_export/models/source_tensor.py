"""A tensor of the checkpoint as rules see it: one layer's and expert's, wherever it is stored."""

from __future__ import annotations

from msgspec import Struct

from dist_export.tensors.boxes import Shape
from dist_export.tensors.views import Slab


class SourceTensor(Struct, frozen=True):
    """Where one layer's (and expert's) tensor lies, with the shape that is left after the fixed dims."""

    slab: Slab
    shape: Shape
    dtype: str
