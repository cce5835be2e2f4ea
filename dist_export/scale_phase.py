"""The scale phase of a run: before the first quantised byte every process has the same frozen scale table."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.convert.outputs import write_error
from dist_export.convert.scale_table import ScaleTable, entries_of, find, share, table_of
from dist_export.convert.sources import SourceFiles
from dist_export.convert.view_reader import ViewReader
from dist_export.models.low_rank import Updates
from dist_export.models.quantization import Quantization
from dist_export.runtime.collective import all_reduce_max
from dist_export.runtime.group import Group

KEPT = "scales.json"
"""In the staging folder: what a resumed run goes on with."""


def find_scales(
    quantization: Quantization,
    index: CheckpointIndex,
    group: Group,
    *,
    device: str,
    updates: Updates,
    staging: Path | None,
) -> tuple[ScaleTable, int, int]:
    """The scale table, and the bytes that this process needed and read for it.

    All ranks call it, rank 0 with its staging folder. Each process finds its share, one MAX all-reduce (over NCCL where
    every rank has a GPU, `device`) makes the table. A table that an earlier run left in `staging` is taken
    as it is, so that a resumed run quantises with the very same scales. Raises `ExportError`.
    """
    kept = staging / KEPT if staging is not None else None
    found = kept.read_bytes() if kept is not None and kept.is_file() else b""
    found = group.broadcast("kept scales", found if group.rank == 0 else None)
    if found:
        return ScaleTable.decode(found), 0, 0
    entries = entries_of(quantization)
    with closing(SourceFiles(index)) as sources:
        reader = ViewReader(sources, index.shapes(), updates)
        mine = share(entries, group.rank, group.world_size)
        values = find(entries, mine, reader)
        table = table_of(entries, all_reduce_max(values, group, step="scales", device=device), quantization)
        if kept is not None:
            try:
                part = kept.with_suffix(".part")  # a kill must not leave half a table for a resumed run to read
                part.write_bytes(table.encode())
                os.replace(part, kept)
            except OSError as error:
                raise write_error(kept, error) from error
        return table, sum(entries[number].num_bytes_needed for number in mine), sources.num_bytes_read
