"""Which arithmetic a process uses, and on which device: torch is imported only where it pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dist_export.convert.execute import Converter
from dist_export.convert.numpy_arithmetic import MOST_BYTES, NumpyArithmetic
from dist_export.errors import ExportError
from dist_export.plan.work import Use

if TYPE_CHECKING:
    from dist_export.convert.torch_lanes import Lanes


def device_of(asked: str, local_rank: int) -> str:
    """The torch device that ``--device`` means for a process; ``auto`` imports torch to find out.

    Raises `ExportError` where torch is not installed.
    """
    _require_torch()
    if asked != "auto":
        return asked
    from dist_export.convert.torch_lanes import default_device

    return default_device(local_rank)


def converter_for(uses: Sequence[Use], asked: str, lanes: Callable[[], Lanes]) -> Converter:
    """What does the value operations of `uses`: numpy for a few on a CPU or where there is no torch, else torch in
    `lanes`. Raises `ExportError` where torch is needed and not installed."""
    small = sum(use.num_bytes for use in uses) <= MOST_BYTES
    supported = asked in ("auto", "cpu") and all(NumpyArithmetic.supports(use.output.planned) for use in uses)
    if supported and (small or not _has_torch()):
        return NumpyArithmetic()
    _require_torch()
    from dist_export.convert.torch_arithmetic import TorchArithmetic

    return TorchArithmetic(lanes())


def _has_torch() -> bool:
    return find_spec("torch") is not None


def _require_torch() -> None:
    if not _has_torch():
        raise ExportError("quantised exports and --device cuda need torch; run: pip install 'dist-export[torch]'")
