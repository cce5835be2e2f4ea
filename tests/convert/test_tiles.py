"""Tiles cover every element that is used, once, whatever the chunks; reads stay within chunks and the buffer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_export.convert.sources import SourceRectangle
from dist_export.convert.tiles import ROW_GAP_BYTES, cut
from dist_export.plan.recipes import Codes, Encoded, StoredScales
from dist_export.plan.shard import PlannedTensor
from dist_export.plan.work import OutputTensor, Use, WorkItem
from dist_export.tensors.dtypes import BFLOAT16, FLOAT32, INT8
from dist_export.tensors.views import Slab, View

ROWS, WIDTH = 12, 10


def use(top: int, bottom: int, left: int, right: int) -> Use:
    planned = PlannedTensor("t", BFLOAT16, View.zeros((bottom - top, right - left)), BFLOAT16, ())
    return Use((top, bottom, left, right), OutputTensor(0, 0, planned, 0), 0, 0)


def chunk_grid(row_cuts: list[int], column_cuts: list[int], *, transposed: bool = False) -> list[SourceRectangle]:
    rectangles = []
    for top, bottom in itertools.pairwise(row_cuts):
        for left, right in itertools.pairwise(column_cuts):
            strides = (2, (bottom - top) * 2) if transposed else ((right - left) * 2, 2)
            rectangles.append(SourceRectangle(len(rectangles), (top, bottom), (left, right), 0, *strides))
    return rectangles


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    return st.sets(st.integers(1, size - 1), max_size=3).map(lambda inner: sorted({0, size} | inner))


SPAN = st.tuples(
    st.integers(0, ROWS - 1), st.integers(1, ROWS), st.integers(0, WIDTH - 1), st.integers(1, WIDTH)
).filter(lambda s: s[0] < s[1] and s[2] < s[3])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(SPAN, min_size=1, max_size=4), cuts(ROWS), cuts(WIDTH), st.integers(0, 400), st.booleans(),
    st.tuples(st.integers(0, ROWS - 1), st.integers(1, ROWS)).filter(lambda r: r[0] < r[1]),
)  # fmt: skip
def test_every_used_element_is_read_and_handed_out_once(
    spans: list[tuple[int, int, int, int]],
    row_cuts: list[int],
    column_cuts: list[int],
    tile_bytes: int,
    transposed: bool,
    rows: tuple[int, int],
) -> None:
    uses = [use(*span) for span in spans]
    item = WorkItem(Slab("w"), (ROWS, WIDTH), BFLOAT16, rows, tuple(uses))
    handed = [np.zeros((ROWS, WIDTH), int) for _ in uses]
    for tile in cut(item, chunk_grid(row_cuts, column_cuts, transposed=transposed), tile_bytes):
        assert rows[0] <= tile.rows[0] < tile.rows[1] <= rows[1]
        read = np.zeros((ROWS, WIDTH), int)
        for part in tile.reads:
            assert part.rectangle.rows[0] <= tile.rows[0] and tile.rows[1] <= part.rectangle.rows[1]
            assert part.rectangle.columns[0] <= part.columns[0] < part.columns[1] <= part.rectangle.columns[1]
            read[slice(*tile.rows), slice(*part.columns)] += 1
        num_rows = tile.rows[1] - tile.rows[0]
        assert num_rows == 1 or sum(part.num_bytes(num_rows, 2) for part in tile.reads) <= max(tile_bytes, 1)
        assert read.max() == 1
        for number, each in enumerate(uses):
            if any(each is other for other in tile.uses):
                top, bottom, left, right = each.source
                part = (slice(max(top, tile.rows[0]), min(bottom, tile.rows[1])), slice(left, right))
                assert (read[part] == 1).all()
                handed[number][part] += 1
    for number, (top, bottom, left, right) in enumerate(spans):
        expected = np.zeros((ROWS, WIDTH), int)
        expected[max(top, rows[0]) : max(min(bottom, rows[1]), max(top, rows[0])), left:right] = 1
        assert (handed[number] == expected).all()


@pytest.mark.parametrize(("gap", "num_reads"), [(ROW_GAP_BYTES, 1), (ROW_GAP_BYTES + 2, 2)])
def test_columns_far_apart_are_read_apart(gap: int, num_reads: int) -> None:
    width = 8 + gap // 2 + 8
    rectangle = SourceRectangle(0, (0, 4), (0, width), 0, width * 2, 2)
    item = WorkItem(Slab("w"), (4, width), BFLOAT16, (0, 4), (use(0, 4, 0, 8), use(0, 4, width - 8, width)))
    (tile,) = cut(item, [rectangle], 1 << 30)
    assert len(tile.reads) == num_reads
    assert sum(read.num_bytes(4, 2) for read in tile.reads) == (4 * width * 2 if num_reads == 1 else 4 * 16 * 2)


@pytest.mark.parametrize(("left_out", "whole"), [(ROW_GAP_BYTES, True), (ROW_GAP_BYTES + 2, False)])
def test_parts_of_rows_are_read_with_what_lies_between_only_where_that_is_little(left_out: int, whole: bool) -> None:
    width = 64 + left_out // 2
    rectangle = SourceRectangle(0, (0, 4), (0, width), 0, width * 2, 2)
    item = WorkItem(Slab("w"), (4, width), BFLOAT16, (0, 4), (use(0, 4, 0, 64),))
    (tile,) = cut(item, [rectangle], 1 << 30)
    assert tile.reads[0].whole_rows is whole
    assert tile.reads[0].num_bytes(4, 2) == (3 * width * 2 + 128 if whole else 4 * 128)


@pytest.mark.parametrize("tile_bytes", [1, 20, 60, 61, 100])
def test_rows_that_share_a_byte_are_not_torn_apart(tile_bytes: int) -> None:
    """INT4 codes of two rows lie in one byte: no tile may begin or end between them, however small a buffer is."""
    scales = StoredScales(View.zeros((ROWS, 1)), FLOAT32, 7.0)
    codes = PlannedTensor("t", INT8, View.zeros((ROWS, WIDTH)), BFLOAT16, (), recipe=Encoded(Codes.INT4, scales))
    pairs = Use((0, ROWS, 0, WIDTH), OutputTensor(0, 0, codes, 0), 0, 0)
    item = WorkItem(Slab("w"), (ROWS, WIDTH), BFLOAT16, (0, ROWS), (pairs, use(0, ROWS, 0, WIDTH)))
    tiles = list(cut(item, chunk_grid([0, ROWS], [0, WIDTH]), tile_bytes))
    assert [row % 2 for tile in tiles for row in tile.rows] == [0] * 2 * len(tiles)
    assert [tile.rows[0] for tile in tiles] == [0, *(tile.rows[1] for tile in tiles[:-1])]
    assert tiles[-1].rows[1] == ROWS and len(tiles) > 1
