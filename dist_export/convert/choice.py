"""Which arithmetic a process uses, and on which device: torch is imported only where it pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dist_export.convert.execute import Converter
from dist_export.convert.numpy_arithmetic import MOST_BYTES, NumpyArithmetic
from dist_export.plan.work import Use


def device_of(asked: str, local_rank: int) -> str:
    """The torch device that ``--device`` means for a process; ``auto`` imports torch to find out."""
    if asked != "auto":
        return asked
    from dist_export.convert.torch_arithmetic import default_device

    return default_device(local_rank)


def converter_for(uses: Sequence[Use], asked: str, device: Callable[[], str]) -> Converter:
    """What does the value operations of `uses`: numpy for a few on a CPU, else torch on `device`."""
    small = sum(use.num_bytes for use in uses) <= MOST_BYTES
    if small and asked in ("auto", "cpu") and all(NumpyArithmetic.supports(use.output.planned) for use in uses):
        return NumpyArithmetic()
    from dist_export.convert.torch_arithmetic import TorchArithmetic

    return TorchArithmetic(device())
