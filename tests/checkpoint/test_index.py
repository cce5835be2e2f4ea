"""The columnar chunk table against plain lists, and the check that chunks tile their tensor."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_export.checkpoint.index import Chunk, without_wrapper_prefix
from dist_export.checkpoint.index_builder import IndexBuilder, tiling_faults
from dist_export.errors import ExportError
from dist_export.tensors.boxes import Box, partition_faults

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(SHAPES)
    spans = []
    for size in shape:
        cuts = sorted({0, size} | draw(st.sets(st.integers(0, size), max_size=3)))
        spans.append(list(itertools.pairwise(cuts)))
    boxes = [Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in itertools.product(*spans)]
    return shape, draw(st.permutations(boxes))


@settings(max_examples=150, deadline=None)
@given(grids(), st.data())
def test_chunks_of_a_box(grid: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, boxes = grid
    builder = IndexBuilder(Path("/nowhere"), "test", chunks_are_records=False)
    builder.add("before", (4,), "int8", [Chunk(Box((0,), (4,)), builder.file("x"), 0, 4)])
    chunks = [Chunk(box, builder.file(f"f{i % 3}"), 10 * i, i + 1) for i, box in enumerate(boxes)]
    builder.add("w", shape, "float32", chunks)
    builder.add("after", (), "int8", [Chunk(Box((), ()), builder.file("x"), 4, 1)])
    index = builder.build()
    ordered = sorted(chunks, key=lambda chunk: chunk.box.start)
    assert index.chunks("w") == ordered
    assert index.chunks("after")[0].box == Box((), ())
    assert index.num_weight_bytes == 4 + sum(range(1, len(boxes) + 1)) + 1
    start = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    size = tuple(data.draw(st.integers(1, whole - a)) for a, whole in zip(start, shape, strict=True))
    window = Box(start, size)
    assert index.chunks("w", window) == [chunk for chunk in ordered if chunk.box.intersection(window)]


@settings(max_examples=150, deadline=None)
@given(grids(), st.data())
def test_tiling_is_exact_also_after_a_fault(grid: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, boxes = grid
    assert tiling_faults(boxes, shape) == []
    number = data.draw(st.integers(0, len(boxes) - 1))
    box, dim = boxes[number], data.draw(st.integers(0, len(shape) - 1))
    start, size = list(box.start), list(box.size)
    change = data.draw(st.sampled_from(["drop", "longer", "shift", "twice"]))
    if change == "longer":
        size[dim] += 1
    elif change == "shift":
        start[dim] += 1
    changed = [*boxes[:number], Box(tuple(start), tuple(size)), *boxes[number + 1 :]]
    if change == "drop":
        changed = boxes[:number] + boxes[number + 1 :]
    elif change == "twice":
        changed = [*boxes, box]
    assert bool(tiling_faults(changed, shape)) == bool(partition_faults(changed, shape))
    assert tiling_faults(changed, shape)


@pytest.mark.parametrize("parts", [(70, 1), (1, 70), (40, 40)])
def test_many_chunks(parts: tuple[int, int]) -> None:
    boxes = [Box((3 * i, 2 * j), (3, 2)) for i in range(parts[0]) for j in range(parts[1])]
    shape = (3 * parts[0], 2 * parts[1])
    builder = IndexBuilder(Path("/nowhere"), "test", chunks_are_records=False)
    builder.add("w", shape, "int8", [Chunk(box, builder.file("x"), 6 * i, 6) for i, box in enumerate(boxes[::-1])])
    index = builder.build()
    windows = [(0, 0, 1, 1), (*(n - 1 for n in shape), 1, 1), (0, 0, *shape), (shape[0] // 2, 0, 1, shape[1])]
    for top, left, height, width in windows:
        window = Box((top, left), (height, width))
        found = [chunk.box for chunk in index.chunks("w", window)]
        assert found == [box for box in boxes if box.intersection(window)]
    for broken in (boxes[1:], [*boxes, boxes[0]], [Box((0, 0), (3, 3)), *boxes[1:]]):
        assert tiling_faults(broken, shape)


def test_all_faults_come_at_once() -> None:
    builder = IndexBuilder(Path("/ckpt"), "test", chunks_are_records=False)
    builder.add("a", (4,), "int8", [Chunk(Box((0,), (3,)), 0, 0, 3)])
    builder.add("b", (4,), "int8", [Chunk(Box((0,), (3,)), 0, 0, 3), Chunk(Box((2,), (2,)), 0, 0, 2)])
    builder.add("a", (4,), "int8", [Chunk(Box((0,), (4,)), 0, 0, 4)])
    with pytest.raises(ExportError) as error:
        builder.build()
    assert str(error.value).splitlines() == [
        "/ckpt: chunks do not make whole tensors: 3 faults",
        "  - a: 1 of 4 elements are not covered",
        "  - b: boxes [0:3] and [2:4] overlap",
        "  - a is there twice, with and without a model. or module. prefix",
    ]


def test_wrapper_prefixes() -> None:
    assert without_wrapper_prefix("model.module.module.decoder.w") == "decoder.w"
    assert without_wrapper_prefix("decoder.model.w") == "decoder.model.w"
