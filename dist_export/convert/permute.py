"""Tensors made a slice at a time: stacked experts in another order (transposed, gate and up alternating), and heads
whose queries take their keys in.

One slice is read, made and written at a time: its elements come from all over it, so that there is nothing to gain
from smaller tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_export.convert.numpy_arithmetic import NumpyArithmetic
from dist_export.convert.view_reader import ViewReader
from dist_export.errors import ExportError
from dist_export.plan.recipes import Absorbed
from dist_export.plan.shard import PlannedTensor

Raw = npt.NDArray[Any]


def permuted_slices(planned: PlannedTensor, reader: ViewReader) -> Iterator[Raw]:
    """The elements of a planned tensor, one slice along its leading dim (or one head) after the other.

    Raises `ExportError` for element types that need a cast which numpy has not.
    """
    if isinstance(planned.recipe, Absorbed):
        from dist_export.convert.absorb import absorbed_heads  # imports torch

        yield from absorbed_heads(planned, reader)
        return
    if not planned.moves_only and not NumpyArithmetic.supports(planned):
        raise ExportError(
            f"{planned.name}: cannot be cast from {planned.source_dtype} to {planned.dtype} in this order"
        )
    num_slices, *inner = planned.view.shape
    num_rows = inner[0] if len(inner) > 1 else 1
    for number in range(num_slices):
        block = reader.rows(planned.view, planned.source_dtype, (number * num_rows, (number + 1) * num_rows))
        if not planned.moves_only:
            block = NumpyArithmetic().apply(planned, block)
        yield in_order(block.reshape(inner), interleaved=planned.interleaved, transposed=planned.transposed)


def in_order(block: Raw, *, interleaved: bool, transposed: bool) -> Raw:
    """One slice ``[out, in]`` or ``[out]`` as it is stored, contiguous."""
    if interleaved:
        halves = block.reshape(2, block.shape[0] // 2, *block.shape[1:])
        block = np.swapaxes(halves, 0, 1).reshape(block.shape)
    return np.ascontiguousarray(block.T if transposed else block)
