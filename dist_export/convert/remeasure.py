"""What codes that an earlier run wrote are worth: the sampled rows are read and encoded once more, and written nowhere.

So the quality report of a resumed run tells of all tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dist_export.convert.execute import Executor
from dist_export.convert.low_rank import LowRankMerger
from dist_export.convert.quality import sampled_rows
from dist_export.convert.tiles import Tile
from dist_export.plan.recipes import Codes, Encoded
from dist_export.plan.work import Use, WorkItem, flat_shape


def is_measured(codes: Codes) -> bool:
    """Whether the report tells what codes are worth: those that are made here of weights."""
    return not codes.are_stored and not codes.are_weights and codes is not Codes.E2M1_SCALES


def measure_done(executor: Executor, items: Sequence[WorkItem]) -> None:
    """Note the quality of what this process need not encode again. Before `Executor.run`."""
    merger = LowRankMerger(executor.sources)
    for tile in executor.done_tiles(items):
        for use in tile.uses:
            recipe = use.output.planned.recipe
            if isinstance(recipe, Encoded) and is_measured(recipe.codes):
                for rows in _sampled(tile, use):
                    _measure(executor, merger, tile.item, use, rows)


def _sampled(tile: Tile, use: Use) -> Iterator[tuple[int, int]]:
    """Ranges of source rows of the tile whose codes in the tensor are sampled."""
    top, bottom = max(use.source[0], tile.rows[0]), min(use.source[1], tile.rows[1])
    shift = use.row - use.source[0]
    num_rows, _ = flat_shape(use.output.planned.view.shape)
    first = end = -1
    for row in sampled_rows(top + shift, bottom + shift, num_rows):
        if row != end:
            if first >= 0:
                yield top + first, top + end
            first = row
        end = row + 1
    if first >= 0:
        yield top + first, top + end


def _measure(executor: Executor, merger: LowRankMerger, item: WorkItem, use: Use, rows: tuple[int, int]) -> None:
    assert executor.encoder is not None and executor.reader is not None, f"{use.output.planned.name} needs an encoder"
    left, right = use.source[2:]
    block = executor.reader.rectangle(item.slab, item.shape, item.dtype, (*rows, left, right))
    if item.update is not None:
        merger.merge(Tile(item, rows, (), ()), [(left, block)])
    shift = use.row - use.source[0]
    place = (rows[0] + shift, rows[1] + shift, use.column, use.column + right - left)
    with executor.encoder.begin(use.output.planned, np.ascontiguousarray(block), place, key=use.output.key):
        executor.observer.progress(block.nbytes, 0)
