"""Plans turned into work: rectangles, needed bytes and zeros, against counting elements one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from support.plans import plan_of
from support.small_models import LLAMA, small_model

from dist_export.plan.work import _union_area, collect_uses, flat_rectangle, flat_shape
from dist_export.tensors.boxes import Box

RECTANGLE = st.tuples(*[st.integers(0, 6)] * 4).map(
    lambda r: (min(r[:2]), max(r[:2]) + 1, min(r[2:]), max(r[2:]) + 1)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(RECTANGLE, max_size=6))
def test_needed_bytes_count_every_element_once(rectangles: list[tuple[int, int, int, int]]) -> None:
    grid = np.zeros((8, 8), bool)
    for top, bottom, left, right in rectangles:
        grid[top:bottom, left:right] = True
    assert _union_area(rectangles) == grid.sum()


def test_boxes_become_rectangles_of_rows_and_columns() -> None:
    assert [flat_shape(shape) for shape in ((), (5,), (3, 5), (2, 3, 5))] == [(1, 1), (1, 5), (3, 5), (6, 5)]
    assert flat_rectangle(Box((), ()), ()) == (0, 1, 0, 1)
    assert flat_rectangle(Box((2,), (3,)), (5,)) == (0, 1, 2, 5)
    assert flat_rectangle(Box((1, 2), (2, 3)), (3, 5)) == (1, 3, 2, 5)
    assert flat_rectangle(Box((1, 1, 2), (1, 2, 3)), (2, 3, 5)) == (4, 6, 2, 5)
    assert flat_rectangle(Box((0, 0, 2), (2, 3, 3)), (2, 3, 5)) == (0, 6, 2, 5)


def test_uses_and_fills_write_every_element_of_every_file_once() -> None:
    plan = plan_of(small_model(LLAMA, num_query_groups=1), tp_size=4, vocab_size=57)
    slabs, fills = collect_uses(plan.shards(), plan.catalog.tensors)
    written = {
        (file, index): np.zeros(flat_shape(tensor.shape), int)
        for file, shard in plan.shards().items()
        for index, tensor in enumerate(shard.tensors)
    }
    for slab in slabs:
        for use in slab.uses:
            top, bottom, left, right = use.source
            target = written[use.output.file, use.output.index]
            target[use.row : use.row + bottom - top, use.column : use.column + right - left] += 1
    for fill in fills:
        written[fill.output.file, fill.output.index].reshape(-1)[fill.first : fill.first + fill.num_elements] += 1
    assert all((counts == 1).all() for counts in written.values())
    assert sum(fill.num_elements for fill in fills) == 2 * (60 - 57) * 32
