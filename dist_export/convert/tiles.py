"""Tiles: how a work item is cut into reads that fit a buffer. Pure arithmetic on located chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from msgspec import Struct

from dist_export.convert.sources import SourceRectangle
from dist_export.plan.work import Use, WorkItem

ROW_GAP_BYTES = 16 << 10
"""Rows that are needed in part are read whole when no more than this lies between the parts.

A separate read per row costs a few microseconds, in which a disk or page cache delivers about this much;
beyond it, skipping is cheaper than reading through."""


class TileRead(Struct, frozen=True):
    """A chunk's part of a tile. `columns` are those read; rows are the tile's."""

    rectangle: SourceRectangle
    columns: tuple[int, int]
    whole_rows: bool
    """One read spans all rows and what lies between; otherwise one read per row (or per column, if transposed)."""

    def num_bytes(self, num_rows: int, itemsize: int) -> int:
        """Bytes that reading `num_rows` rows takes from the file."""
        width = (self.columns[1] - self.columns[0]) * itemsize
        if self.whole_rows:
            return (num_rows - 1) * self.rectangle.row_stride + width
        return num_rows * width


class Tile(Struct, frozen=True):
    """Rows of one work item that are read and written together."""

    item: WorkItem
    rows: tuple[int, int]
    reads: tuple[TileRead, ...]
    uses: tuple[Use, ...]


def cut(item: WorkItem, rectangles: Sequence[SourceRectangle], tile_bytes: int) -> Iterator[Tile]:
    """The tiles of a work item. Each needs at most `tile_bytes` of buffer, or is a single row.

    Within a tile every chunk covers all rows, and so does every column span that is used; uses themselves may
    begin and end inside.
    """
    row_step = item.row_step
    for (first, end), (here, columns) in _bands(item, rectangles):
        reads = tuple(read for rectangle in here for read in _reads(rectangle, columns, item.dtype.itemsize))
        step = _rows_per_tile(reads, item.dtype.itemsize, tile_bytes)
        step = max(step // row_step, 1) * row_step
        for row in range(first, end, step):
            rows = (row, min(row + step, end))
            uses = [use for use in item.uses if use.source[0] < rows[1] and rows[0] < use.source[1]]
            yield Tile(item, rows, reads, tuple(uses))


Columns = tuple[int, int]


def _bands(
    item: WorkItem, rectangles: Sequence[SourceRectangle]
) -> list[tuple[tuple[int, int], tuple[tuple[SourceRectangle, ...], tuple[Columns, ...]]]]:
    """Row ranges over which neither the chunks nor the columns used change, with those chunks and columns."""
    first_use = item.uses[0].source
    if len(rectangles) == 1 and all(use.source == first_use for use in item.uses):  # most experts
        top, bottom = rectangles[0].rows
        if top <= item.rows[0] and item.rows[1] <= bottom:
            return [(item.rows, (tuple(rectangles), (first_use[2:],)))]
    cuts = {item.rows[0], item.rows[1]}
    cuts |= {row for rectangle in rectangles for row in rectangle.rows}
    cuts |= {row for use in item.uses for row in use.source[:2]}
    ordered = sorted(row for row in cuts if item.rows[0] <= row <= item.rows[1])
    bands: list[tuple[tuple[int, int], tuple[tuple[SourceRectangle, ...], tuple[Columns, ...]]]] = []
    for first, end in pairwise(ordered):
        columns = {use.source[2:] for use in item.uses if use.source[0] <= first and end <= use.source[1]}
        here = tuple(r for r in rectangles if r.rows[0] <= first and end <= r.rows[1])
        content = (here, tuple(sorted(columns)))
        if bands and bands[-1][1] == content and bands[-1][0][1] == first:
            bands[-1] = ((bands[-1][0][0], end), content)
        elif columns:
            bands.append(((first, end), content))
    return bands


def _reads(rectangle: SourceRectangle, columns: Sequence[Columns], itemsize: int) -> Iterator[TileRead]:
    """The column spans of a chunk that some use needs, joined where the gap is cheaper to read."""
    spans = sorted((max(left, rectangle.columns[0]), min(right, rectangle.columns[1])) for left, right in columns)
    joined: list[tuple[int, int]] = []
    for left, right in spans:
        if left >= right:
            continue
        if joined and (left - joined[-1][1]) * itemsize <= ROW_GAP_BYTES:
            joined[-1] = (joined[-1][0], max(joined[-1][1], right))
        else:
            joined.append((left, right))
    for left, right in joined:
        contiguous = rectangle.column_stride == itemsize
        gap = rectangle.row_stride - (right - left) * itemsize
        yield TileRead(rectangle, (left, right), contiguous and gap <= ROW_GAP_BYTES)


def _rows_per_tile(reads: Sequence[TileRead], itemsize: int, tile_bytes: int) -> int:
    per_row = sum(
        read.rectangle.row_stride if read.whole_rows else (read.columns[1] - read.columns[0]) * itemsize
        for read in reads
    )
    return max(tile_bytes // max(per_row, 1), 1)
