"""Which rows of a weight an adapter's rows belong to, what is refused because that cannot be told, and the scale."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from support.small_models import model_config

from dist_export.checkpoint.adapters import AdapterSettings
from dist_export.checkpoint.index import Chunk
from dist_export.checkpoint.index_builder import IndexBuilder
from dist_export.errors import ExportError
from dist_export.models.adapter_rows import Placed, RowOrder, placed_rows
from dist_export.models.adapters import updates_of
from dist_export.models.catalog import SourceCatalog
from dist_export.models.low_rank import Updates
from dist_export.models.source_tensor import SourceTensor
from dist_export.tensors.boxes import Box
from dist_export.tensors.views import Slab

SETTINGS = AdapterSettings(
    origin="run_config.yaml",
    kind="LoRA",
    alpha=8.0,
    dim=4,
    normalized_experts=False,
    query_blocks=False,
    always_halves=False,
    tp_size=2,
    expert_tp_size=None,
    glu_interleaved=False,
)
PLAIN_MLP = model_config(gated=False, activation="gelu")
WHERE = "decoder.layers.0.mlp.linear_fc1"


def rows_of(cuts: list[int], *, is_expert: bool = False, num_rows: int = 16, **settings: object) -> list[Placed]:
    order = RowOrder(PLAIN_MLP, replace(SETTINGS, **settings), is_expert)
    b = SourceTensor(Slab("b", ()), (num_rows, 4), "float32")
    return list(placed_rows(order, WHERE, "", num_rows, b, lambda: cuts))


def test_four_cuts_are_halves_of_two_ranks_or_four_ranks_in_order() -> None:
    cuts = [0, 4, 8, 12]
    halves = [Placed(0, 0, 4), Placed(4, 8, 4), Placed(8, 4, 4), Placed(12, 12, 4)]
    assert rows_of(cuts) == halves
    assert rows_of(cuts, tp_size=4) == [Placed(0, 0, 16)]


def test_experts_were_cut_by_their_own_tensor_parallel_size() -> None:
    cuts = [0, 4, 8, 12]
    assert rows_of(cuts, is_expert=True, tp_size=2, expert_tp_size=4) == [Placed(0, 0, 16)]
    assert rows_of(cuts, is_expert=True, tp_size=4, expert_tp_size=2) == rows_of(cuts)
    assert rows_of(cuts, is_expert=False, tp_size=4, expert_tp_size=2) == [Placed(0, 0, 16)]


@pytest.mark.parametrize("cuts", [[0, 4, 8, 11], [0, 8, 12, 14], [0, 5], [0, 4, 8]])
def test_rows_cut_in_another_way_are_refused(cuts: list[int]) -> None:
    with pytest.raises(ExportError, match=rf"is saved in {len(cuts)} chunks of rows, from which"):
        rows_of(cuts)


FC1 = "decoder.layers.{}.mlp.linear_fc1"
FC2 = "decoder.layers.0.mlp.experts.experts.{}.linear_fc2"


def updates(shapes: dict[str, tuple[int, ...]], *, cuts: int = 1, **settings: object) -> Updates:
    """What adapters add, of tensors of these shapes that no file holds. B is in `cuts` chunks of rows."""
    builder = IndexBuilder(Path("/checkpoint"), "torch_dist", chunks_are_records=False)
    for name, shape in shapes.items():
        num = cuts if "linear_out" in name else 1
        size = (*shape[:-2], shape[-2] // num, shape[-1])
        boxes = [Box((*(0 for _ in shape[:-2]), number * size[-2], 0), size) for number in range(num)]
        builder.add(name, shape, "float32", [Chunk(box, builder.file("a"), 0, 4 * box.num_elements) for box in boxes])
    index = builder.build()
    base = {name: each for name, each in index.shapes().items() if ".adapter." not in name}
    return updates_of(index, replace(SETTINGS, **settings), SourceCatalog(base), model_config())


def pair(module: str, shape: tuple[int, int], *, rank: int = 4, part: str = "") -> dict[str, tuple[int, ...]]:
    adapter = f"{module}.adapter{part and f'.adapter_{part}'}"
    return {f"{adapter}.linear_in.weight": (rank, shape[1]), f"{adapter}.linear_out.weight": (shape[0], rank)}


def test_experts_are_scaled_by_their_own_rank() -> None:
    """``normalize_moe_lora`` divides the rank of experts' adapters; each adapter's scale is alpha over its rank."""
    module = FC2.format(0)
    shapes = {f"{module}.weight": (8, 12), **pair(module, (8, 12), rank=2)}
    (update,) = updates(shapes, normalized_experts=True).values()
    assert [term.factor for term in update.terms] == [4.0]
    with pytest.raises(ExportError, match=r"an adapter of rank 2, run_config.yaml says dim 4"):
        updates(shapes)


def test_rows_with_two_adapters_are_refused() -> None:
    module = FC1.format(0)
    shapes = {f"{module}.weight": (24, 8), **pair(module, (24, 8))}
    assert len(updates(shapes)) == 1
    with pytest.raises(ExportError, match=r"linear_fc1.weight: two adapters for the same rows"):
        updates({**shapes, **pair(module, (12, 8), part="up")}, cuts=2)
    halves = {f"{module}.weight": (24, 8), **pair(module, (12, 8), part="gate"), **pair(module, (12, 8), part="up")}
    (update,) = updates(halves, cuts=2).values()
    assert [term.rows for term in update.terms] == [(0, 6), (6, 12), (12, 18), (18, 24)]


def test_matrices_that_belong_to_nothing_are_named() -> None:
    """A is stacked over three layers, B over two: the third A has no B."""
    module = "decoder.layers.self_attention.linear_proj"
    shapes: dict[str, tuple[int, ...]] = {f"{module}.weight": (3, 8, 8)}
    shapes[f"{module}.adapter.linear_in.weight"] = (3, 4, 8)
    assert len(updates({**shapes, f"{module}.adapter.linear_out.weight": (3, 8, 4)})) == 3
    with pytest.raises(ExportError, match=r"layers.2.self_attention.linear_proj: its adapter has only one of"):
        updates({**shapes, f"{module}.adapter.linear_out.weight": (2, 8, 4)})


def test_adapters_of_rows_that_training_interleaved_are_refused() -> None:
    module = FC1.format(0)
    shapes = {f"{module}.weight": (24, 8), **pair(module, (24, 8))}
    with pytest.raises(ExportError, match=r"training interleaved gate and up, which adapters of linear_fc1 do not"):
        updates(shapes, glu_interleaved=True)
    module = "decoder.layers.0.mlp.linear_fc2"
    assert updates({f"{module}.weight": (8, 12), **pair(module, (8, 12))}, glu_interleaved=True)
