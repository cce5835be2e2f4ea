"""Merged elements are what their definition says, whatever the tiles; the comparison's own merge agrees bit for bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapters import added, product
from support.torch_dist import grid_chunks, write_torch_dist

from dist_export.checkpoint.open import open_checkpoint
from dist_export.convert.low_rank import LowRankMerger
from dist_export.convert.sources import SourceFiles
from dist_export.convert.tiles import Tile
from dist_export.errors import ExportError
from dist_export.models.low_rank import LowRankTerm, LowRankUpdate
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.work import SlabUses, WorkItem
from dist_export.tensors.dtypes import dtype_by_name
from dist_export.tensors.views import Slab
from dist_export.verify.merging import merge_rows

ROWS, COLUMNS, RANK = 24, 40, 7
Terms = tuple[tuple[int, int, int], ...]
"""(first row, end, row of b)."""


@pytest.fixture
def matrices(tmp_path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"base": (ROWS, COLUMNS), "b": (ROWS, RANK), "a": (RANK, COLUMNS)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["a"] = made["a"].t().contiguous().t()  # stored column by column
    return {**made, "b": made["b"].bfloat16()}


def update(tensors: dict[str, torch.Tensor], *, terms: Terms, factor: float) -> LowRankUpdate:
    a, b = (
        SourceTensor(Slab(name), tuple(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch."))
        for name in ("a", "b")
    )
    return LowRankUpdate(tuple(LowRankTerm((first, end), row, b, a, factor) for first, end, row in terms))


def tile(made: LowRankUpdate, dtype: str, rows: tuple[int, int]) -> Tile:
    item = WorkItem(Slab("base"), (ROWS, COLUMNS), dtype_by_name(dtype), (0, ROWS), (), made)
    return Tile(item, rows, (), ())


def raw(tensor: torch.Tensor) -> np.ndarray:
    size = tensor.element_size()
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[size]).numpy().view(f"u{size}").copy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiles_of_any_shape_give_the_defined_elements(
    dtype: torch.dtype, matrices: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    chunks = grid_chunks(lambda name, tensor: {"a": (1, 4), "b": (3, 7)}.get(name, (1, 1)))
    index = open_checkpoint(write_torch_dist(tmp_path / "c", matrices, args=None, chunks=chunks)).index
    base, name = matrices["base"].to(dtype), str(dtype).removeprefix("torch.")
    swapped = ((0, 10, 14), (12, 24, 2))  # rows of b out of order; rows 10 and 11 keep their values
    b = torch.zeros_like(matrices["b"])
    for first, end, row in swapped:
        b[first:end] = matrices["b"][row : row + end - first]
    expected = added(base, product(matrices["a"], b), alpha=5, rank=RANK)
    expected[10:12] = base[10:12]
    made = update(matrices, terms=swapped, factor=5 / RANK)
    sources = SourceFiles(index)
    try:
        for step, edges in ((ROWS, (0, COLUMNS)), (5, (0, 3, 17, COLUMNS)), (1, (8, COLUMNS))):
            found, merger = raw(base), LowRankMerger(sources)
            for top in range(0, ROWS, step):
                rows = (top, min(top + step, ROWS))
                parts = [(left, found[top : rows[1], left:right]) for left, right in pairwise(edges)]
                merger.merge(tile(made, name, rows), parts)
            assert np.array_equal(found[:, edges[0] :], raw(expected)[:, edges[0] :])
        again = raw(base)
        slab = SlabUses(Slab("base"), (ROWS, COLUMNS), dtype_by_name(name), (), made)
        for top in range(0, ROWS, 7):
            rows = (top, min(top + 7, ROWS))
            merge_rows(slab, again[slice(*rows)], rows, lambda m, r: raw(matrices[m.slab.name][slice(*r)]))
        assert np.array_equal(again, raw(expected))
    finally:
        sources.close()


def test_a_value_that_becomes_too_large(matrices: dict[str, torch.Tensor], tmp_path: Path) -> None:
    index = open_checkpoint(write_torch_dist(tmp_path / "c", matrices, args=None)).index
    sources = SourceFiles(index)
    made = update(matrices, terms=((0, ROWS, 0),), factor=1e9)
    block = raw(matrices["base"].half())
    try:
        with pytest.raises(ExportError, match=r"base: \d+ elements become too large for float16 when b is merged"):
            LowRankMerger(sources).merge(tile(made, "float16", (0, ROWS)), [(0, block)])
    finally:
        sources.close()


def test_bytes_to_read() -> None:
    tensors = {"a": torch.zeros(RANK, COLUMNS), "b": torch.zeros(ROWS, RANK).bfloat16()}
    made = update(tensors, terms=((0, 10, 14), (12, 24, 2)), factor=1.0)
    assert made.num_bytes((0, ROWS)) == 4 * RANK * COLUMNS + 2 * RANK * 22
    assert made.num_bytes((8, 13)) == 4 * RANK * COLUMNS + 2 * RANK * 3
    assert made.num_bytes((10, 12)) == 0
