"""What a checkpoint format is to the rest of the program, and the formats of plain weight folders.

Weights come as ``torch_dist``, ``zarr``, legacy ``mp_rank_`` or plain ``torch.distributed.checkpoint`` folders;
trainers other than Megatron-LM (`nemo`, `nemo2`, `bridge`) put one of these into a folder or archive of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from msgspec import Struct

from dist_export.checkpoint import torch_dist
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import ExportError


class Format(Struct, frozen=True):
    """How one format is recognised and read."""

    name: str
    """Begins the `CheckpointIndex.format` of every table that `read_index` makes."""
    recognises: Callable[[Path], bool]
    """Whether a path (an iteration folder, an archive) is of this format. Reads names and small files only."""
    read_index: Callable[[Path], CheckpointIndex]
    """The chunk table."""
    read_common: Callable[[CheckpointIndex], Mapping[str, object]]
    """What training saved beside the weights: ``args`` and ``iteration`` where they are there. Needs no more than
    the table, since the processes of a node share one."""


def _later(module: str, name: str) -> Callable[[Any], Any]:
    """A function of a module next to this one, which is imported when it is called: most runs need one format."""

    def function(argument: Any) -> Any:
        return getattr(import_module(f"dist_export.checkpoint.{module}"), name)(argument)

    return function


def _format(name: str, module: str, recogniser: str) -> Format:
    return Format(name, _later(module, recogniser), _later(module, "read_index"), _later(module, "read_common_state"))


WEIGHT_FORMATS = (
    Format(torch_dist.FORMAT, torch_dist.is_torch_dist, torch_dist.read_index, torch_dist.read_common_state),
    _format("zarr", "zarr_dist", "is_zarr"),
    _format("legacy", "legacy", "is_legacy"),
    _format("torch_dcp", "dcp", "is_dcp"),
    _format("fsdp_dtensor", "dcp", "is_dcp"),
)
"""Folders of weights. First match wins."""


def weight_format(folder: Path) -> Format | None:
    """The format of a folder of weights, or None."""
    return next((each for each in WEIGHT_FORMATS if each.recognises(folder)), None)


def read_weights(folder: Path, container: str) -> CheckpointIndex:
    """The chunk table of the weights inside of a `container` (``NeMo 2``), named ``NeMo 2 (torch_dist)``."""
    found = weight_format(folder)
    if found is None:
        known = ", ".join(each.name for each in WEIGHT_FORMATS)
        raise ExportError(f"{folder}: holds no weights in a format that {container} writes ({known}), or not all of it")
    return found.read_index(folder).relabelled(f"{container} ({found.name})")


def inner_common(index: CheckpointIndex) -> dict[str, object]:
    """The common state of weights that `read_weights` read."""
    inner = index.format.partition("(")[2].rstrip(")")
    found = next(each for each in WEIGHT_FORMATS if each.name == inner)
    return dict(found.read_common(index))
