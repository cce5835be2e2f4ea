"""`validate` finds every fault that can be planted in a plan, except one it cannot: two equal boxes swapped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec import structs

pytest.importorskip("torch")

from support.plans import plan_of
from support.small_models import GPT, LLAMA, NEMOTRON, small_model

from dist_export.errors import ExportError, Faults
from dist_export.plan.export import ExportPlan, validate
from dist_export.plan.shard import PlannedTensor, ShardPlan
from dist_export.tensors.boxes import Box
from dist_export.tensors.views import Piece, View

FC = "transformer.layers.0.mlp.fc.weight"
GATE = "transformer.layers.0.mlp.gate.weight"
FC1 = r"decoder.layers.mlp.linear_fc1.weight\[0\]"


@pytest.mark.parametrize("style", [LLAMA, GPT, NEMOTRON])
@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (4, 1)])
def test_whole_plans_are_partitions(style: dict[str, object], layout: tuple[int, int]) -> None:
    plan = plan_of(small_model(style), tp_size=layout[0], pp_size=layout[1], vocab_size=61)
    assert validate(plan) == {"padding rows of the vocabulary": 2 * 3 * 32}


def changed(plan: ExportPlan, name: str, change: Callable[[PlannedTensor], list[PlannedTensor]]) -> ExportPlan:
    """The plan with one tensor of rank 0 replaced by others."""
    tensors = [new for t in plan.shard(0).tensors for new in (change(t) if t.name == name else [t])]
    plan._shards[0] = ShardPlan(plan.shard(0).file_name, tuple(tensors))
    return plan


def with_pieces(change: Callable[[Piece], list[Piece]]) -> Callable[[PlannedTensor], list[PlannedTensor]]:
    def replace(tensor: PlannedTensor) -> list[PlannedTensor]:
        pieces = tuple(new for piece in tensor.view.pieces for new in change(piece))
        return [structs.replace(tensor, view=View(tensor.view.shape, pieces))]

    return replace


def _gap(piece: Piece) -> list[Piece]:
    rows, width = piece.box.size
    return [structs.replace(piece, box=Box((0, 0), (rows - 1, width)))]


def _overlap(piece: Piece) -> list[Piece]:
    return [piece, Piece(Box((5, 0), (1, piece.box.size[1])), piece.slab, (5, 0))]


def _outside(piece: Piece) -> list[Piece]:
    return [structs.replace(piece, box=Box((piece.box.start[0] + 1, piece.box.start[1]), piece.box.size))]


def _shifted_source(piece: Piece) -> list[Piece]:
    return [structs.replace(piece, source_start=(1, 0))]


def _zeros(piece: Piece) -> list[Piece]:
    return [Piece(piece.box, None)]


FAULTS = {
    "gap": (with_pieces(_gap), rf"{FC}: 32 of 768 elements are not covered"),
    "overlap": (with_pieces(_overlap), rf"{FC}: boxes .* overlap"),
    "outside": (with_pieces(_outside), rf"{FC}: box \[1:25, 0:32\] is outside the shape \[24, 32\]"),
    "dropped tensor": (lambda tensor: [], rf"{FC1}: 768 of its 3072 elements go nowhere"),
    "dropped rows": (with_pieces(_shifted_source), rf"{FC1}: 32 of its 3072 elements go nowhere"),
    "zeros instead": (with_pieces(_zeros), rf"{FC1}: 768 of its 3072 elements go nowhere"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    change, message = FAULTS[fault]
    plan = changed(plan_of(small_model(LLAMA), tp_size=2), FC, change)
    with pytest.raises(ExportError, match=f"(?s)the plan is not a partition: .*{message}"):
        validate(plan)


def test_a_tensor_written_twice_is_found_when_planning() -> None:
    plan = plan_of(small_model(LLAMA))
    twice = structs.replace(plan.planner, rules=plan.planner.rules + plan.planner.rules[:1])
    faults = Faults("plan")
    twice.plan(0, file_name="rank0.safetensors", faults=faults)
    assert faults.messages == ["rank 0: transformer.vocab_embedding.weight is written 2 times"]


def test_two_equal_boxes_swapped_are_invisible_here() -> None:
    """A plan that takes gate for up is a partition all the same: only values can tell (`tests/targets`)."""
    plan = plan_of(small_model(LLAMA), tp_size=2)
    views = {t.name: t.view for t in plan.shard(0).tensors}
    for name, other in ((FC, GATE), (GATE, FC)):
        plan = changed(plan, name, lambda t, other=other: [structs.replace(t, view=views[other])])
    validate(plan)


def test_tensors_without_a_rule_and_rows_beyond_the_padding() -> None:
    import torch

    model = small_model(LLAMA)
    model.tensors["decoder.adapter.weight"] = torch.zeros(4, 4)
    with pytest.raises(ExportError, match=r"no place for: unexpected tensor decoder.adapter.weight"):
        validate(plan_of(model))
