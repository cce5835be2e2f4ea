"""Value operations on blocks of elements, with torch: on a GPU where there is one, on the CPU otherwise.

Imported only when a plan needs much arithmetic, or some that numpy cannot do: see
`dist_export.convert.numpy_arithmetic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct, field

from dist_export.convert.overflow import overflow_error
from dist_export.convert.torch_lanes import Bytes, HostLanes, Lanes, Pending
from dist_export.models.value_ops import ValueOp
from dist_export.plan.shard import PlannedTensor
from dist_export.tensors.dtypes import BFLOAT16, FLOAT16


class TorchArithmetic(Struct, frozen=True):
    """Applies a planned tensor's value operations and its cast. Any thread may use it."""

    lanes: Lanes = field(default_factory=HostLanes)

    @property
    def in_flight(self) -> int:
        """How many blocks of a thread may be under way while it begins another."""
        return self.lanes.in_flight

    def begin(self, planned: PlannedTensor, block: npt.NDArray[Any]) -> Pending:
        """`block` [rows, columns] of raw source elements (unsigned integers) -> contiguous target bytes.

        Operations run in the source's element type and round once each; the cast comes last. Entering the result
        raises `ExportError` when a finite value does not fit the target's element type.
        """
        return self.lanes.send(block, planned.source_dtype, partial(_work, planned), partial(_finish, planned))

    def apply(self, planned: PlannedTensor, block: npt.NDArray[Any]) -> Bytes:
        """As `begin`, with the result."""
        with self.begin(planned, block) as data:
            return data if self.in_flight == 0 else data.copy()


_OPERATIONS = {ValueOp.ADD_ONE: lambda values: values + 1, ValueOp.SUBTRACT_ONE: lambda values: values - 1}


_SPECIAL = {BFLOAT16: (0x7F80, 0x7FC0), FLOAT16: (0x7C00, 0x7E00)}
"""Bits of infinity and of the NaN that is written."""


def _work(planned: PlannedTensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
    """The target's elements, and what `_finish` looks at: the number of values lost to infinity and the largest."""
    for op in planned.values:
        values = _OPERATIONS[op](values)
    target = values.to(getattr(torch, planned.dtype.name))
    if target is values or planned.dtype not in _SPECIAL or planned.source_dtype.itemsize == 1 or not values.numel():
        return (target,)
    infinity, quiet_nan = _SPECIAL[planned.dtype]
    bits = target.view(torch.int16)
    if values.device.type == "cpu" and int((bits & 0x7FFF).max()) < infinity:  # on a GPU asking would wait
        return (target,)
    bits.masked_fill_(torch.isnan(values), quiet_nan)  # of which every processor has its own
    lost = torch.isinf(target) & torch.isfinite(values)
    largest = torch.where(lost, values, torch.zeros_like(values)).abs().max()
    return target, torch.stack((lost.sum().double(), largest.double()))


def _finish(planned: PlannedTensor, results: Sequence[Bytes]) -> Bytes:
    if len(results) > 1:
        num_lost, largest = results[1].view(np.float64).tolist()
        if num_lost:
            raise overflow_error(planned, int(num_lost), largest)
    return results[0]
