"""The scale phase of a run: before the first quantised byte every process has the same frozen scale table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from msgspec import Struct, field

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.convert.measuring import KeptBytes, measure, room_for_kept
from dist_export.convert.outputs import write_error
from dist_export.convert.scale_table import ScaleTable, entries_of, find, share, table_of
from dist_export.convert.sources import SourceFiles
from dist_export.convert.view_reader import ViewReader
from dist_export.machinery import Resources
from dist_export.models.quantization import Quantization
from dist_export.plan.work import WorkItem
from dist_export.runtime.collective import all_reduce_max
from dist_export.runtime.group import Group
from dist_export.runtime.watch import Watcher

KEPT = "scales.json"
"""In the staging folder: what a resumed run goes on with."""


class FoundScales(Struct):
    """What the phase leaves a process with."""

    table: ScaleTable = field(default_factory=lambda: ScaleTable({}, {}, {}))
    kept: KeptBytes = field(default_factory=lambda: KeptBytes(0))
    """Weights that were measured here and will be transferred here: see `KeepingSources`."""
    bytes_needed: int = 0
    """That the phase reads and nothing else does."""
    bytes_read: int = 0


def find_scales(
    quantization: Quantization,
    index: CheckpointIndex,
    group: Group,
    *,
    items: Sequence[WorkItem],
    resources: Resources,
    staging: Path | None,
) -> FoundScales:
    """The scale table. All ranks call it, rank 0 with its staging folder, each with the `items` of its transfer.

    Each process reads its share of what is stored and measures the weights that it will transfer, of which it keeps
    as many as its memory allows; one MAX all-reduce (over NCCL where every rank has a GPU) makes the table. A table
    that an earlier run left in `staging` is taken as it is, so that a resumed run quantises with the very same scales.
    Nothing is done, and no torch imported, where there is nothing to find. Raises `ExportError`.
    """
    entries = entries_of(quantization)
    if not entries:
        return FoundScales(table_of(entries, np.zeros(0, np.float32), quantization))
    device = resources.torch_device()
    room = room_for_kept(resources.host_memory, num_threads=resources.num_threads, device=device)
    file, keep = staging / KEPT if staging is not None else None, KeptBytes(room)
    found = file.read_bytes() if file is not None and file.is_file() else b""
    found = group.broadcast("kept scales", found if group.rank == 0 else None)
    if found:
        return FoundScales(ScaleTable.decode(found), keep)
    with closing(SourceFiles(index)) as sources:
        reader = ViewReader(sources, index.shapes(), quantization.logical.catalog.updates)
        mine = share(entries, group.rank, group.world_size)
        values = find(entries, mine, reader)
        again = measure(entries, items, sources, keep=keep, values=values, observer=Watcher(group))
        table = table_of(entries, all_reduce_max(values, group, step="scales", device=device), quantization)
        if file is not None:
            _write(file, table)
        needed = sum(entries[number].num_bytes_needed for number in mine) + again
        return FoundScales(table, keep, needed, sources.num_bytes_read)


def _write(file: Path, table: ScaleTable) -> None:
    try:
        part = file.with_suffix(".part")  # a kill must not leave half a table for a resumed run to read
        part.write_bytes(table.encode())
        os.replace(part, file)
    except OSError as error:
        raise write_error(file, error) from error
