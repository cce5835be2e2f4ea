"""Value operations on blocks of elements, with torch: on a GPU where there is one, on the CPU otherwise.

Imported only when a plan needs much arithmetic, or some that numpy cannot do: see
`dist_export.convert.numpy_arithmetic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_export.convert.overflow import overflow_error
from dist_export.models.value_ops import ValueOp
from dist_export.plan.shard import PlannedTensor
from dist_export.tensors.dtypes import DType


@dataclass(slots=True)
class TorchArithmetic:
    """Applies a planned tensor's value operations and its cast. Any thread may use it."""

    device: str = "cpu"

    def apply(self, planned: PlannedTensor, block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`block` [rows, columns] of raw source elements (unsigned integers) -> contiguous target bytes.

        Operations run in the source's element type and round once each; the cast comes last. Raises
        `ExportError` when a finite value does not fit the target's element type.
        """
        source = _as_torch(block, planned.source_dtype).to(self.device)
        values = source
        for op in planned.values:
            values = _OPERATIONS[op](values)
        target = values.to(getattr(torch, planned.dtype.name))
        if planned.dtype.itemsize < 4:
            _refuse_overflow(planned, values, target)
        return _as_bytes(target.contiguous().cpu())


_OPERATIONS = {ValueOp.ADD_ONE: lambda values: values + 1, ValueOp.SUBTRACT_ONE: lambda values: values - 1}


def default_device(local_rank: int) -> str:
    """The GPU of this process where there is one (ranks beyond their number share them), else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{local_rank % torch.cuda.device_count()}"


def _as_torch(block: npt.NDArray[Any], dtype: DType) -> torch.Tensor:
    contiguous = np.ascontiguousarray(block)
    signed = contiguous.view(f"i{dtype.itemsize}") if dtype.itemsize > 1 else contiguous
    return torch.from_numpy(signed).view(getattr(torch, dtype.name))


def _as_bytes(tensor: torch.Tensor) -> npt.NDArray[Any]:
    # A contiguous tensor of one element may have any stride, which view refuses.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    result: npt.NDArray[Any] = flat.view(torch.uint8).numpy()
    return result


def _refuse_overflow(planned: PlannedTensor, before: torch.Tensor, after: torch.Tensor) -> None:
    """A finite value that became infinite is lost."""
    infinite = torch.isinf(after)
    if bool(infinite.any()):
        lost = infinite & torch.isfinite(before)
        if bool(lost.any()):
            raise overflow_error(planned, int(lost.sum()), before[lost].abs().max().item())
