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

    ``cuda`` is a GPU of the process's own as far as there are enough. Raises `ExportError` where torch is not
    installed, and for a device that is not there.
    """
    _require_torch()
    if asked == "cpu":
        return asked
    from dist_export.convert.torch_lanes import default_device, num_gpus

    if asked == "auto":
        return default_device(local_rank)
    kind, _, number = asked.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise ExportError(f"--device {asked}: expected auto, cpu, cuda or cuda:N")
    if int(number or 0) >= num_gpus():
        raise ExportError(f"--device {asked}: torch finds {num_gpus()} GPUs here; use auto or cpu")
    return asked if number else default_device(local_rank)


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
