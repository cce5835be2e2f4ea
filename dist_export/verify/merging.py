"""Merges adapters once more, for the comparison: written apart from the executor's, to the same definition.

`dist_export.models.low_rank` defines every element of a merged tensor, so that two ways to compute it must agree in
every bit: this one goes row by row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.work import SlabUses
from dist_export.tensors.dtypes import FLOAT16, FLOAT32, DType, dtype_by_name
from dist_export.verify.output import Block

Float32 = npt.NDArray[np.float32]


def merge_rows(
    slab: SlabUses, band: Block, rows: tuple[int, int], read: Callable[[SourceTensor, tuple[int, int]], Block]
) -> None:
    """Add to `band`, the raw elements of rows `rows` of a slab, what its update says; in place.

    `read` gives rows of a matrix, raw.
    """
    assert slab.update is not None, f"{slab.slab} has no update"
    for term in slab.update.terms:
        first, end = max(term.rows[0], rows[0]), min(term.rows[1], rows[1])
        if first >= end:
            continue
        start = term.b_row + first - term.rows[0]
        a = to_float32(read(term.a, (0, term.a.shape[0])), dtype_by_name(term.a.dtype))
        b = to_float32(read(term.b, (start, start + end - first)), dtype_by_name(term.b.dtype))
        for number in range(end - first):
            row = band[first - rows[0] + number]
            total = np.zeros(a.shape[1], np.float32)
            for k, weight in enumerate(b[number]):
                product = weight * a[k]
                total = total + product if k else product
            with np.errstate(over="ignore", invalid="ignore"):
                row[...] = rounded(to_float32(row, slab.dtype) + np.float32(term.factor) * total, slab.dtype)


def to_float32(raw: Block, dtype: DType) -> Float32:
    """Exact."""
    if dtype is FLOAT32:
        return raw.view(np.float32)
    if dtype is FLOAT16:
        return raw.view(np.float16).astype(np.float32)
    wide: npt.NDArray[np.float32] = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def rounded(values: Float32, dtype: DType) -> Block:
    """To nearest, ties to even."""
    if dtype is FLOAT32:
        return values.view(np.uint32)
    if dtype is FLOAT16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, upper).astype(np.uint16)
