"""What a checkpoint format is to the rest of the program, and the formats of plain weight folders.

Weights come as ``torch_dist``, ``zarr``, legacy ``mp_rank_`` or plain ``torch.distributed.checkpoint`` folders;
trainers other than Megatron-LM (`nemo`, `nemo2`, `bridge`) put one of these into a folder or archive of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_export.checkpoint import dcp, legacy, torch_dist, zarr_dist
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import ExportError


@dataclass(frozen=True, slots=True)
class Format:
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


WEIGHT_FORMATS = (
    Format(torch_dist.FORMAT, torch_dist.is_torch_dist, torch_dist.read_index, torch_dist.read_common_state),
    Format(zarr_dist.FORMAT, zarr_dist.is_zarr, zarr_dist.read_index, zarr_dist.read_common_state),
    Format(legacy.FORMAT, legacy.is_legacy, legacy.read_index, legacy.read_common_state),
    Format(dcp.FORMAT, dcp.is_dcp, dcp.read_index, dcp.read_common_state),
    Format(dcp.FSDP_FORMAT, dcp.is_dcp, dcp.read_index, dcp.read_common_state),
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
