"""Plans of very large models: a rank's plan touches nothing but its own tensors, and experts come out right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

pytest.importorskip("torch")

import torch
from support.exports import tensors_of
from support.large_models import LargeModel, dense_405b, moe_1t
from support.large_plans import large_plan, shapes_of
from support.torch_dist import write_torch_dist

from dist_export.checkpoint.open import open_checkpoint
from dist_export.errors import ExportError
from dist_export.models.catalog import SourceCatalog
from dist_export.models.logical import LogicalModel
from dist_export.plan.export import ExportPlan, validate
from dist_export.plan.job import ExportJob
from dist_export.plan.layout import TargetLayout
from dist_export.runtime.group import Group
from dist_export.session import ExportSession, RunOptions

SMALL = {"hidden_size": 16, "ffn_hidden_size": 8, "num_heads": 4, "num_groups": 2, "head_size": 8, "vocab_size": 64}
FC, PROJ = "transformer.layers.{}.mlp.fc.weight", "transformer.layers.{}.mlp.proj.weight"


def small(**changes: object) -> LargeModel:
    """Three layers of eight experts."""
    return moe_1t(**{**SMALL, "num_layers": 3, "num_experts": 8, "tp": 2, **changes})


def asked_for(plan: ExportPlan, rank: int, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, int, int]]:
    """The source tensors that planning one rank looks at: (folded name, layer, expert)."""
    seen: set[tuple[str, int, int]] = set()
    find = SourceCatalog.find

    def noted(self: SourceCatalog, pattern: str, *, layer: int = -1, expert: int = -1):  # type: ignore[no-untyped-def]
        seen.add((pattern, layer, expert))
        return find(self, pattern, layer=layer, expert=expert)

    with monkeypatch.context() as patch:
        patch.setattr(SourceCatalog, "find", noted)
        plan.shard(rank)
    return seen


@pytest.mark.parametrize("per_layer", [False, True])
def test_one_rank_of_a_trillion_looks_at_its_own_layers_and_experts(
    per_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = large_plan(moe_1t(per_layer=per_layer), tp=8, pp=8, moe_ep=8)
    rank = 3 * 8 + 5
    seen = asked_for(plan, rank, monkeypatch)
    layers, experts = plan.planner.layout.layers(rank), range(160, 192)
    assert {layer for _, layer, _ in seen} == set(layers)
    assert {expert for _, _, expert in seen if expert >= 0} == set(experts)
    assert len(seen) < len(layers) * (2 * len(experts) + 12)
    assert set(plan._shards) == {rank}


def test_the_tp_ranks_of_a_stage_look_at_its_tensors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = large_plan(small(num_layers=48, num_experts=128), tp=2, pp=1)
    first, second = (asked_for(plan, rank, monkeypatch) for rank in (0, 1))
    assert len(first) > 48 * 2 * 128 and not second


def test_of_all_ranks_of_405b_few_are_kept_when_they_are_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_export.plan.export.MAX_KEPT_PIECES", 500)
    plan = large_plan(dense_405b(), tp=8, pp=16)
    assert validate(plan) == {}
    assert 0 < sum(shard.num_pieces for shard in plan._shards.values()) <= 500
    assert len(plan.planner.logical._kept) <= LogicalModel.MOST_KEPT
    summaries = plan.summaries()
    assert len(summaries) == 128
    assert plan.summary(77) == summaries[77]
    assert [summaries[77].digest, summaries[77].num_data_bytes] == [
        plan.shard(77).digest(), plan.shard(77).num_data_bytes
    ]  # fmt: skip
    config = plan.resolved.config
    rows = (config.num_attention_heads + 2 * config.num_query_groups) * config.head_size
    layer = config.hidden_size * (rows + config.num_attention_heads * config.head_size + 3 * config.ffn_hidden_size)
    norms = 2 * config.hidden_size
    per_stage = [n * (layer + 8 * norms) for n in plan.planner.layout.layers_per_stage]
    table = config.vocab_size * config.hidden_size
    expected = 2 * (sum(per_stage) + 2 * table + 8 * config.hidden_size)
    assert sum(summary.num_data_bytes for summary in summaries) == expected


def test_a_large_mixture_is_covered_and_a_gap_in_it_is_found() -> None:
    model = moe_1t(num_layers=4, num_experts=64)
    plan = large_plan(model, tp=4, pp=2, moe_ep=4)
    assert validate(plan) == {}
    missing = [rule for rule in plan.planner.rules if "mlp.proj" not in rule.target]
    planner = structs.replace(plan.planner, rules=tuple(missing))
    broken = structs.replace(
        plan, planner=planner, files=structs.replace(plan.files, planner=planner), _shards={}, _summaries={}
    )
    gap = r"linear_fc2.weight\[0\]\[0\]: 22020096 of its 22020096 elements go nowhere(?s:.*)and 236 more"
    with pytest.raises(ExportError, match=f"the plan is not a partition: 256 faults(?s:.*){gap}"):
        validate(broken)


def test_a_missing_expert_is_named() -> None:
    shapes = shapes_of(small(per_layer=True))
    del shapes["decoder.layers.1.mlp.experts.experts.6.linear_fc2.weight"]
    plan = large_plan(small(per_layer=True), tp=2, pp=1, moe_ep=2, catalog=SourceCatalog(shapes))
    message = r"rank 1: .*layers.1.mlp.proj.weight: missing tensor of layer 1, expert 6: the checkpoint has no .*fc2"
    with pytest.raises(ExportError, match=message):
        plan.shards()


@pytest.mark.parametrize(
    ("tp", "ep", "positions"),
    [
        (4, 1, [(0, 4, 0), (1, 4, 0), (2, 4, 0), (3, 4, 0)]),
        (4, 2, [(0, 2, 0), (0, 2, 1), (1, 2, 0), (1, 2, 1)]),
        (4, 4, [(0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 1, 3)]),
    ],
)
def test_ranks_on_the_axes_of_experts(tp: int, ep: int, positions: list[tuple[int, int, int]]) -> None:
    layout = TargetLayout(tp, 2, (3, 3), ep)
    for rank in range(2 * tp):
        tp_rank, tp_size, part = positions[rank % tp]
        position = layout.expert_tensor_parallel(rank)
        assert (position.rank, position.size, layout.moe_tp_size) == (tp_rank, tp_size, tp_size)
        assert layout.experts(rank, 8) == range(part * 8 // ep, (part + 1) * 8 // ep)


def test_layouts_of_experts_that_do_not_divide() -> None:
    with pytest.raises(ExportError, match="tp 4 is no multiple of moe ep 3"):
        TargetLayout(4, 1, (2,), 3)
    with pytest.raises(ExportError, match="6 experts do not divide by moe ep 4"):
        TargetLayout(4, 1, (2,), 4).experts(0, 6)
    with pytest.raises(ExportError, match=r"mlp\.fc\.weight: 8 experts do not divide by moe ep 3"):
        large_plan(small(num_groups=3, num_heads=6), tp=3, pp=1, moe_ep=3).shards()


def stored_apart(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A key per layer and expert."""
    if ".experts.experts." in name:
        head, rest = name.removeprefix("decoder.layers.").split("experts.experts.")
        return {
            f"decoder.layers.{i}.{head}experts.experts.{e}.{rest}": tensor[i, e].clone()
            for i in range(tensor.shape[0]) for e in range(tensor.shape[1])
        }  # fmt: skip
    if not name.startswith("decoder.layers."):
        return {name: tensor}
    return {f"decoder.layers.{i}.{name.removeprefix('decoder.layers.')}": part.clone() for i, part in enumerate(tensor)}


def stored_stacked(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One tensor over layers and experts."""
    return {name: tensor}


@pytest.mark.parametrize("moe_ep", [1, 2, 4])
@pytest.mark.parametrize("store", [stored_stacked, stored_apart])
def test_exported_experts_are_those_of_the_model(
    tmp_path: Path, moe_ep: int, store: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    """Values, by indexing: ``fc`` is [experts of the rank, up then gate, hidden], ``proj`` [experts, hidden, ffn]."""
    model, generator = small(), torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(stored.shape, generator=generator).bfloat16() for name, stored in model.tensors().items()
    }
    kept = {key: part for name, tensor in weights.items() for key, part in store(name, tensor).items()}
    folder = write_torch_dist(tmp_path / "iter_0000010", kept, args=model.arguments())
    checkpoint = open_checkpoint(folder)
    plan = large_plan(model, tp=4, pp=1, moe_ep=moe_ep, catalog=SourceCatalog(checkpoint.index.shapes()))
    assert validate(plan) == {}
    with Group.single() as group:
        ExportSession(checkpoint, ExportJob((plan,)), RunOptions(output=tmp_path / "out"), group).run()
    fc1 = weights["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    fc2 = weights["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
    gate, up = fc1.chunk(2, dim=2)
    moe_tp = 4 // moe_ep
    for rank in range(4):
        tensors = tensors_of(tmp_path / "out" / f"rank{rank}.safetensors")
        experts = np.arange(8).reshape(moe_ep, -1)[rank % moe_ep]
        cut = slice(rank // moe_ep * 8 // moe_tp, (rank // moe_ep + 1) * 8 // moe_tp)
        for layer in range(3):
            expected = torch.cat([up[layer][experts, cut], gate[layer][experts, cut]], dim=1)
            assert torch.equal(tensors[FC.format(layer)], expected)
            assert torch.equal(tensors[PROJ.format(layer)], fc2[layer][experts][:, :, cut])
            router = weights["decoder.layers.mlp.router.weight"][layer].float()
            assert torch.equal(tensors[f"transformer.layers.{layer}.mlp.router.weight"], router)


def test_a_stacked_catalogue_is_small_whatever_the_number_of_experts() -> None:
    catalog = SourceCatalog(shapes_of(moe_1t()))
    assert (catalog.num_layers, catalog.num_experts()) == (60, 256)
    assert sum(len(entry.stored) for entry in catalog._entries.values()) == len(moe_1t().tensors())
    assert sum(1 for _ in catalog.slabs()) == 3 + 60 * 5 + 2 * 60 * 256
    apart = SourceCatalog(shapes_of(moe_1t(per_layer=True)))
    assert (apart.num_layers, apart.num_experts()) == (60, 256)
    assert sum(1 for _ in apart.slabs()) == len(apart.tensors) == 3 + 60 * 5 + 2 * 60 * 256
