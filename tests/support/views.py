"""Running views on numbers, so that what they describe can be compared with numpy doing the same."""

from __future__ import annotations

import numpy as np

from dist_export.tensors.views import Slab, View


def source(shape: tuple[int, ...], name: str = "source") -> tuple[View, dict[Slab, np.ndarray]]:
    """A view of a whole tensor of `shape` and the tensor: 1, 2, 3 … in row-major order."""
    slab = Slab(name)
    return View.of(slab, shape), {slab: np.arange(1, int(np.prod(shape)) + 1).reshape(shape)}


def run(view: View, sources: dict[Slab, np.ndarray]) -> np.ndarray:
    """Copy the pieces of a view; -1 marks what no piece wrote."""
    result = np.full(view.shape, -1)
    for piece in view.pieces:
        here = tuple(slice(a, a + n) for a, n in zip(piece.box.start, piece.box.size, strict=True))
        if piece.slab is None:
            result[here] = 0
            continue
        size = piece.box.size[len(piece.box.size) - len(piece.source_start) :]
        there = tuple(slice(a, a + n) for a, n in zip(piece.source_start, size, strict=True))
        result[here] = sources[piece.slab][there].reshape(piece.box.size)
    return result
