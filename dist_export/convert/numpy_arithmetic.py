"""Value operations with numpy alone, bit for bit what torch computes.

Most exports move bytes and cast a few norms. Importing torch for those would take longer than the whole
export of a small model, so small amounts of arithmetic are done here and large ones by
`dist_export.convert.torch_arithmetic`, on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dist_export.convert.overflow import overflow_error
from dist_export.models.value_ops import ValueOp
from dist_export.plan.shard import PlannedTensor
from dist_export.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType

Float32 = npt.NDArray[np.float32]

SUPPORTED = frozenset({FLOAT32, FLOAT16, BFLOAT16})
MOST_BYTES = 64 << 20  # of one process; beyond it torch is faster although it takes a second to import


class NumpyArithmetic(Struct, frozen=True):
    """Applies a planned tensor's value operations and its cast. Has no state: any thread may use it."""

    in_flight: ClassVar[int] = 0
    """As `TorchArithmetic` has it: everything is done on the spot."""

    @staticmethod
    def supports(planned: PlannedTensor) -> bool:
        """Whether both element types are known here."""
        return {planned.dtype, planned.source_dtype} <= SUPPORTED

    def begin(self, planned: PlannedTensor, block: npt.NDArray[Any]) -> AbstractContextManager[npt.NDArray[Any]]:
        """As `apply`; raises at once."""
        return nullcontext(self.apply(planned, block))

    def apply(self, planned: PlannedTensor, block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`block` [rows, columns] of raw source elements (unsigned integers) -> contiguous target elements.

        Operations run in the source's element type and round once each; the cast comes last. Raises
        `ExportError` when a finite value does not fit the target's element type.
        """
        values = to_float32(np.ascontiguousarray(block), planned.source_dtype)
        for op in planned.values:
            values = to_float32(from_float32(_OPERATIONS[op](values), planned.source_dtype), planned.source_dtype)
        target = from_float32(values, planned.dtype)
        if planned.dtype is FLOAT16 or planned.dtype is BFLOAT16:
            _refuse_overflow(planned, values, target)
        return target


_OPERATIONS: dict[ValueOp, Callable[[Float32], Float32]] = {
    ValueOp.ADD_ONE: lambda values: values + np.float32(1),
    ValueOp.SUBTRACT_ONE: lambda values: values - np.float32(1),
}


def to_float32(raw: npt.NDArray[Any], dtype: DType) -> Float32:
    """Exact: every float16 and bfloat16 is a float32."""
    if dtype is BFLOAT16:
        wide: Float32 = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)  # numpy 1 makes int64 of a bare 16
        return wide
    return raw.view(np.float16 if dtype is FLOAT16 else np.float32).astype(np.float32, copy=False)


def from_float32(values: Float32, dtype: DType) -> npt.NDArray[Any]:
    """Round to nearest, ties to even; NaN becomes the quiet NaN."""
    if dtype is FLOAT32:
        return values.view(np.uint32)
    if dtype is FLOAT16:
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16).view(np.uint16)
        nan = np.isnan(values)
        return np.where(nan, np.uint16(0x7E00), halves) if nan.any() else halves
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _refuse_overflow(planned: PlannedTensor, before: Float32, after: npt.NDArray[Any]) -> None:
    lost = np.isfinite(before) & ~np.isfinite(to_float32(after, planned.dtype))
    if lost.any():
        raise overflow_error(planned, int(lost.sum()), float(np.abs(before[lost]).max()))
