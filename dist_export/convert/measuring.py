"""Amax of weights that nobody has calibrated: each process measures what it will transfer, and keeps what it read.

Kept bytes serve the transfer's reads from memory, as far as the budget for buffers has room beside the buffers; the
others are read twice. Either way the same bytes are measured and the same are written.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.convert.execute import (
    BUFFERS_PER_THREAD,
    DEVICE_TILE_BYTES,
    HOST_COPIES,
    PINNED_COPIES,
    TILE_BYTES,
    Observer,
)
from dist_export.convert.low_rank import LowRankMerger
from dist_export.convert.scale_table import MEASURE_BYTES, Entry, Float32, magnitudes
from dist_export.convert.sources import SourceFiles
from dist_export.convert.tile_reads import Block, read_part
from dist_export.convert.tiles import Tile, TileRead, cut
from dist_export.plan.work import WorkItem
from dist_export.tensors.views import Slab


def room_for_kept(host_memory: int, *, num_threads: int, device: str = "cpu") -> int:
    """Bytes of the budget that the transfer's buffers leave (`dist_export.convert.execute.Budget`)."""
    buffers = (BUFFERS_PER_THREAD + HOST_COPIES) * TILE_BYTES
    if device.startswith("cuda"):
        buffers = (BUFFERS_PER_THREAD + PINNED_COPIES) * DEVICE_TILE_BYTES
    return max(host_memory - num_threads * buffers, 0)


USUAL_ROOM = room_for_kept(1 << 30, num_threads=2)
"""With what the command line declares by default."""


class KeptBytes:
    """Parts of source files in memory, up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0
        self._parts: dict[int, dict[int, memoryview]] = defaultdict(dict)
        self._starts: dict[int, list[int]] = {}

    def add(self, file: int, offset: int, data: memoryview) -> bool:
        """Keep `data`, which must not change, if there is room. Not to be called once something was taken."""
        if self.num_bytes + data.nbytes > self.limit:
            return False
        if offset not in self._parts[file]:
            self._parts[file][offset] = data
            self.num_bytes += data.nbytes
        return True

    def fill(self, file: int, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` from `offset` of a file; False, and nothing that counts, when not all of it is kept."""
        parts = self._parts.get(file)
        if not parts:
            return False
        if file not in self._starts:
            self._starts[file] = sorted(parts)
        starts, done = self._starts[file], 0
        while done < buffer.nbytes:
            number = bisect_right(starts, offset + done) - 1
            if number < 0:
                return False
            skipped = offset + done - starts[number]
            part = parts[starts[number]][skipped : skipped + buffer.nbytes - done]
            if not part.nbytes:
                return False
            buffer[done : done + part.nbytes] = part
            done += part.nbytes
        return True


class KeepingSources(SourceFiles):
    """Source files of which parts are in memory."""

    def __init__(self, index: CheckpointIndex, kept: KeptBytes, *, give_back: bool = False) -> None:
        super().__init__(index, give_back=give_back)
        self.kept = kept

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """As its base: what is kept is not read again, nor counted."""
        if not self.kept.fill(file, offset, buffer):
            super().read_into(file, offset, buffer)


def measured_slabs(entries: Sequence[Entry]) -> Mapping[Slab, int]:
    """Weights of which the amax has to be found -> the number of their entry."""
    return {each.slab: number for number, entry in enumerate(entries) if not entry.stored for each in entry.measured}


def num_bytes_to_measure(items: Iterable[WorkItem], slabs: Mapping[Slab, int]) -> int:
    """Source bytes of the items that a process measures."""
    return sum(_weight_bytes(item) for item in items if item.slab in slabs)


def _weight_bytes(item: WorkItem) -> int:
    """What the item needs of the weight itself."""
    beside = sum(use.num_scale_bytes(item.rows) for use in item.uses)
    return item.num_bytes_needed - beside - (item.update.num_bytes(item.rows) if item.update else 0)


def measure(
    entries: Sequence[Entry],
    items: Sequence[WorkItem],
    sources: SourceFiles,
    *,
    keep: KeptBytes,
    values: Float32,
    observer: Observer,
) -> int:
    """Amax of what this process transfers, into `values` (as `scale_table.find` has them). What is read is put into
    `keep`. Returns the bytes that will have to be read again. Raises `ExportError` for files that end too early.
    """
    slabs, starts = measured_slabs(entries), np.cumsum([0, *(entry.size for entry in entries)])
    merger, again = LowRankMerger(sources), 0
    for item in items:
        if item.slab not in slabs:
            continue
        number = slabs[item.slab]
        found = values[starts[number] : starts[number + 1]]
        for tile, parts, is_kept in _tiles(item, sources, keep):
            num_bytes = sum(block.nbytes for _, block in parts)
            again += 0 if is_kept else num_bytes
            if item.update is not None:
                merger.merge(tile, parts)
            rows = slice(*tile.rows) if entries[number].num_rows else slice(None)
            axis = 1 if entries[number].num_rows else None
            for _, block in parts:
                found[rows] = np.maximum(found[rows], magnitudes(block, item.dtype, axis=axis))  # keeps NaN
            observer.progress(num_bytes, 0)
    return again


def _tiles(
    item: WorkItem, sources: SourceFiles, keep: KeptBytes
) -> Iterator[tuple[Tile, list[tuple[int, Block]], bool]]:
    """The tiles of an item: (tile, first column and block of raw elements per read, whether all of it is kept)."""
    needed = [item.needed(use) for use in item.uses]
    rectangles = sources.rectangles(item.slab, item.shape, item.dtype, needed=needed)
    for tile in cut(item, rectangles, MEASURE_BYTES):
        parts, is_kept = [], True
        for read in tile.reads:
            block, kept = _read(tile, read, sources, keep)
            parts.append((read.columns[0], block))
            is_kept &= kept
        yield tile, parts, is_kept


def _read(tile: Tile, read: TileRead, sources: SourceFiles, keep: KeptBytes) -> tuple[Block, bool]:
    """A tile's part of a chunk, as the transfer will read it, and whether it is kept."""
    num_bytes = read.num_bytes(tile.rows[1] - tile.rows[0], tile.item.dtype.itemsize)
    is_kept = True

    def read_into(file: int, offset: int, part: memoryview) -> None:
        nonlocal is_kept
        sources.read_into(file, offset, part)
        kept = memoryview(bytes(part)) if tile.item.update else part  # which adapters are merged into
        is_kept &= keep.add(file, offset, kept)

    return read_part(tile, read, np.empty(num_bytes, np.uint8).data, read_into), is_kept
