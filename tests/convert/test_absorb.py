"""Queries that take their keys in: what is written is the sum of products in the export's element type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.torch_dist import grid_chunks, write_torch_dist

from dist_export.checkpoint.open import open_checkpoint
from dist_export.convert.permute import permuted_slices
from dist_export.convert.sources import SourceFiles
from dist_export.convert.view_reader import ViewReader
from dist_export.errors import ExportError
from dist_export.models.low_rank import LowRankTerm, LowRankUpdate
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.recipes import Absorbed
from dist_export.plan.shard import PlannedTensor, ShardPlan
from dist_export.plan.work import collect_uses
from dist_export.tensors.dtypes import dtype_by_name
from dist_export.tensors.views import Slab, View

HEADS, NOPE, ROPE, LATENTS, INPUTS = 4, 6, 2, 5, 7
SHAPES = {"q": (HEADS * (NOPE + ROPE), INPUTS), "k": (HEADS * NOPE, LATENTS)}


def planned(source: str, target: str, heads: slice = slice(0, HEADS)) -> PlannedTensor:
    """The heads of a rank."""
    number = heads.stop - heads.start
    queries, keys = (
        View.of(Slab(name), SHAPES[name]).narrow(0, heads.start * rows, number * rows)
        for name, rows in (("q", NOPE + ROPE), ("k", NOPE))
    )
    recipe = Absorbed(keys, dtype_by_name(source), number, NOPE)
    return PlannedTensor("fused", dtype_by_name(target), queries, dtype_by_name(source), (), recipe=recipe)


def made(tensor: PlannedTensor, weights: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """What is written for a planned tensor of a checkpoint that is stored in pieces."""
    chunks = grid_chunks(lambda name, tensor: (3, 1) if name == "k" else (2, 1))
    index = open_checkpoint(write_torch_dist(folder / "c", weights, args=None, chunks=chunks)).index
    sources = SourceFiles(index)
    try:
        slices = list(permuted_slices(tensor, ViewReader(sources, index.shapes())))
    finally:
        sources.close()
    bits = torch.from_numpy(np.concatenate(slices))
    return bits.view(getattr(torch, tensor.dtype.name)).reshape(tensor.shape)


def random_weights(dtype: torch.dtype, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("source, target", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float16")])
def test_weights_are_cast_and_then_multiplied(source: str, target: str, tmp_path: Path) -> None:
    weights = random_weights(getattr(torch, source))
    found = made(planned(source, target), weights, tmp_path).unflatten(0, (HEADS, LATENTS + ROPE))
    queries, keys = (weights[name].to(getattr(torch, target)).unflatten(0, (HEADS, -1)) for name in "qk")
    exact = torch.einsum("hdq,hdk->hkq", queries[:, :NOPE].double(), keys.double())
    assert torch.equal(found[:, :LATENTS], exact.to(found.dtype))  # sums of six products: no order rounds otherwise
    assert torch.equal(found[:, LATENTS:], queries[:, NOPE:])


def test_the_heads_of_a_rank_are_those_of_all(tmp_path: Path) -> None:
    weights = random_weights(torch.bfloat16)
    whole = made(planned("bfloat16", "bfloat16"), weights, tmp_path)
    part = made(planned("bfloat16", "bfloat16", slice(2, 4)), weights, tmp_path / "again")
    assert torch.equal(part, whole[2 * (LATENTS + ROPE) :])


@pytest.mark.parametrize("scale, where", [(300.0, "products"), (1e6, "weights")])
def test_values_that_do_not_fit_are_refused(scale: float, where: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"fused: \d+ values do not fit float16"):
        made(planned("float32", "float16"), random_weights(torch.float32, scale), tmp_path)


@pytest.mark.parametrize("adapted", ["q", "k"])
def test_an_adapter_on_either_weight_is_refused(adapted: str) -> None:
    rows, columns = SHAPES[adapted]
    b, a = SourceTensor(Slab("b"), (rows, 1), "float32"), SourceTensor(Slab("a"), (1, columns), "float32")
    updates = {Slab(adapted): LowRankUpdate((LowRankTerm((0, rows), 0, b, a, 1.0),))}
    plan = ShardPlan("rank0.safetensors", (planned("bfloat16", "bfloat16"),))
    shapes = {name: (shape, "bfloat16") for name, shape in SHAPES.items()}
    with pytest.raises(ExportError, match="an adapter cannot be merged into a tensor of this order"):
        collect_uses({0: plan}, shapes, updates=updates)
