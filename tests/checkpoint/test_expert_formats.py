"""Experts and attention as modules keep them that cannot be built here: fixtures written to Megatron's sources.

Each is a real checkpoint, changed to what the named function of Megatron-Core would have saved of the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch
from support.legacy import ITERATION, as_grouped_by_te, assert_same, expected_tensors, save_again, save_models
from support.megatron_checkpoints import reference_weights
from support.other_formats import exported
from support.torch_dist import grid_chunks, write_torch_dist

from dist_export.checkpoint.legacy import read_index
from dist_export.errors import ExportError
from dist_export.models.catalog import SourceCatalog

Tensors = dict[str, torch.Tensor]
State = dict[str, Any]
EXPERT_FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
ROUTER = "decoder.layers.mlp.router.weight"
BLOCK = 8  # rows
MODELS: dict[str, dict[str, Any]] = {
    "etp1": {"style": "mixtral", "layers": 2, "tp": 2, "pp": 2, "ep": 2, "etp": 1},
    "etp2": {"style": "mixtral", "layers": 2, "tp": 2},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    save_models(folder, MODELS)
    return folder


@pytest.fixture(scope="module")
def reference(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return exported(saved / "etp1" / "torch_dist", tmp_path_factory.mktemp("reference") / "out", "--tp", 2)


@pytest.fixture(scope="module")
def model(saved: Path) -> tuple[Tensors, dict[str, Any]]:
    """Whole tensors of the distributed checkpoint, and its arguments."""
    folder = saved / "etp2" / "torch_dist" / ITERATION
    return reference_weights(folder), vars(torch.load(folder / "common.pt", weights_only=False)["args"])


def norms_of_te(tensors: Tensors) -> None:
    """With TransformerEngine the norm before experts is a module of its own
    (models/gpt/gpt_layer_specs.py, get_gpt_layer_with_transformer_engine_spec)."""
    tensors["decoder.layers.pre_mlp_layernorm.weight"] = tensors.pop("decoder.layers.mlp.linear_fc1.layer_norm_weight")


def router_in_fp32(tensors: Tensors) -> None:
    """transformer/moe/router.py, TopKRouter with moe_router_dtype or as Megatron-LM 0.14 and later keep it."""
    tensors[ROUTER] = tensors[ROUTER].float()


@pytest.mark.parametrize("change", [norms_of_te, router_in_fp32])
def test_other_names_and_types(
    model: tuple[Tensors, dict[str, Any]], reference: dict[str, Any], change: Callable[[Tensors], None], tmp_path: Path
) -> None:
    tensors, args = dict(model[0]), model[1]
    change(tensors)
    folder = write_torch_dist(tmp_path / "iter_0000010", tensors, args=args)
    assert exported(folder, tmp_path / "out", "--tp", 2) == reference


def test_chunks_and_objects_of_grouped_experts(
    model: tuple[Tensors, dict[str, Any]], reference: dict[str, Any], tmp_path: Path
) -> None:
    """transformer/moe/experts.py, TEGroupedMLP.sharded_state_dict: a chunk per expert, gate and up apart, and a
    state per layer and expert (`ShardedObject`)."""

    def cuts(name: str, tensor: torch.Tensor) -> tuple[int, ...]:
        return (*tensor.shape[:2], 2, 1) if name == EXPERT_FC1 else (1,) * tensor.dim()

    name = EXPERT_FC1.replace("weight", "_extra_state")
    objects = {f"{name}/shard_{layer}.{expert}_2.4": [None] for layer in range(2) for expert in range(4)}
    folder = tmp_path / "iter_0000010"
    write_torch_dist(folder, model[0], args=model[1], chunks=grid_chunks(cuts), extra_objects=objects)
    assert exported(folder, tmp_path / "out", "--tp", 2) == reference


def interleaved(fc1: torch.Tensor) -> torch.Tensor:
    """Rows ``[gate; up]`` of one rank as blocks of BLOCK rows that alternate: the inverse of
    TEGroupedMLP._remove_glu_interleaving (transformer/moe/experts.py)."""
    return fc1.reshape(2, -1, BLOCK, fc1.shape[1]).transpose(0, 1).reshape(fc1.shape)


def as_saved(fc1: torch.Tensor, ranks: int) -> torch.Tensor:
    """The global tensor of such experts: halves of each expert-tp rank's rows, as if they were gate and up
    (transformer/mlp.py, apply_swiglu_sharded_factory)."""
    gates, ups = (half.chunk(ranks) for half in fc1.chunk(2))
    rows = [interleaved(torch.cat(parts)).chunk(2) for parts in zip(gates, ups, strict=True)]
    return torch.cat([first for first, _ in rows] + [second for _, second in rows])


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_whose_gate_and_up_rows_alternate(
    model: tuple[Tensors, dict[str, Any]], reference: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    tensors = dict(model[0])
    experts = [as_saved(fc1, ranks) for layer in tensors[EXPERT_FC1] for fc1 in layer]
    tensors[EXPERT_FC1] = torch.stack(experts).reshape(tensors[EXPERT_FC1].shape)
    args = model[1] | {"moe_mlp_glu_interleave_size": BLOCK, "moe_grouped_gemm": True}
    args["expert_tensor_parallel_size"] = ranks
    folder = write_torch_dist(tmp_path / "iter_0000010", tensors, args=args)
    assert exported(folder, tmp_path / "out", "--tp", 2) == reference


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_alternate_in_legacy_files(saved: Path, reference: dict[str, Any], name: str, tmp_path: Path) -> None:
    """As TEGroupedMLP names them; a rank's rows are saved as they are."""

    def change(state: State) -> None:
        as_grouped_by_te(state)
        for key in [key for key in state["model"] if ".experts.linear_fc1.weight" in key]:
            state["model"][key] = interleaved(state["model"][key]).contiguous()
        vars(state["args"]).update(moe_mlp_glu_interleave_size=BLOCK, moe_grouped_gemm=True)

    save = save_again(saved / name / "legacy", tmp_path / "save", change)
    assert exported(save, tmp_path / "out", "--tp", 2) == reference


def test_rows_that_alternate_in_blocks_that_do_not_fit(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    args = model[1] | {"moe_mlp_glu_interleave_size": 96, "moe_grouped_gemm": True}
    folder = write_torch_dist(tmp_path / "iter_0000010", model[0], args=args)
    with pytest.raises(AssertionError, match=r"has 256 rows, which 2 expert-tp ranks cannot share in pairs of blocks"):
        exported(folder, tmp_path / "out")


def test_experts_one_by_one_ignore_the_block_size(
    model: tuple[Tensors, dict[str, Any]], reference: dict[str, Any], tmp_path: Path
) -> None:
    """transformer/mlp.py, MLP.forward: only TEGroupedMLP looks at it."""
    args = model[1] | {"moe_mlp_glu_interleave_size": BLOCK, "moe_grouped_gemm": False}
    folder = write_torch_dist(tmp_path / "iter_0000010", model[0], args=args)
    assert exported(folder, tmp_path / "out", "--tp", 2) == reference


def test_legacy_names_of_te(saved: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """models/gpt/gpt_layer_specs.py, get_gpt_layer_with_transformer_engine_spec: the attention's norm is fused."""

    def change(state: State) -> None:
        as_grouped_by_te(state)
        state["model"] = {
            name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_"): value
            for name, value in state["model"].items()
        }
        state["model"]["decoder.layers.0.mlp.experts.linear_fc1._extra_state"] = torch.empty(0, dtype=torch.uint8)

    save = save_again(saved / "etp1" / "legacy", tmp_path / "save", change)
    assert exported(save, tmp_path / "out", "--tp", 2) == reference


MLA_SIZES = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_pos_emb_head_dim": 4}
_ATTENTION = "decoder.layers.{}.self_attention."
Q_DOWN, KV_DOWN, QKV_DOWN = (_ATTENTION + f"linear_{part}_down_proj.weight" for part in ("q", "kv", "qkv"))


def mla_tensors() -> Tensors:
    """Down projections of both layers, ``[q_lora_rank, h]`` and ``[kv_lora_rank + qk_pos_emb_head_dim, h]``."""
    random = torch.Generator().manual_seed(0)
    return {
        name.format(layer): torch.randn(16, 64, generator=random) for layer in range(2) for name in (Q_DOWN, KV_DOWN)
    }


def duplicated(parts: Tensors, rank: int) -> Tensors:
    """TELinear of parallel_mode "duplicated": every tp rank has all rows."""
    return parts


def split_over_tp(parts: Tensors, rank: int) -> Tensors:
    """ColumnParallelLinear of the local spec."""
    return {name: part.chunk(2)[rank] for name, part in parts.items()}


def fused(of_rank: Callable[[Tensors, int], Tensors]) -> Callable[[Tensors, int], Tensors]:
    """FusedMLASelfAttention: the rank's rows of q, then those of k and v; its norm is the layer's input norm."""

    def joined(parts: Tensors, rank: int) -> Tensors:
        q, kv = of_rank(parts, rank).values()
        name = next(iter(parts)).replace("linear_q_down", "linear_qkv_down")
        return {name: torch.cat([q, kv])}

    return joined


@pytest.mark.parametrize("of_rank", [duplicated, split_over_tp, fused(duplicated), fused(split_over_tp)])
def test_latent_attention_in_legacy_files(
    saved: Path, of_rank: Callable[[Tensors, int], Tensors], tmp_path: Path
) -> None:
    """transformer/multi_latent_attention.py: MLASelfAttention.__init__, FusedMLASelfAttention.sharded_state_dict."""
    whole = mla_tensors()

    def change(state: State, path_rank: tuple[int, int]) -> None:
        tp, pp = path_rank
        parts = {name.format(0): whole[name.format(pp)] for name in (Q_DOWN, KV_DOWN)}
        state["model"] |= {name: part.contiguous() for name, part in of_rank(parts, tp).items()}
        if QKV_DOWN.format(0) in state["model"]:
            norm = state["model"].pop("decoder.layers.0.input_layernorm.weight")
            state["model"][QKV_DOWN.format(0).replace("weight", "layer_norm_weight")] = norm
        vars(state["args"]).update(MLA_SIZES)

    save = save_with_ranks(saved / "etp1" / "legacy", tmp_path / "save", change)
    assert_same(read_index(save / ITERATION), expected_tensors(saved / "etp1") | whole)


def save_with_ranks(source: Path, folder: Path, change: Callable[[State, tuple[int, int]], None]) -> Path:
    """`save_again` for the four ranks of tp 2, pp 2, in the order of their folders."""
    ranks = iter([(tp, pp) for tp in range(2) for pp in range(2)])
    return save_again(source, folder, lambda state: change(state, next(ranks)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "no saved arguments say how many of its rows are q_lora_rank's"),
        ({**MLA_SIZES, "kv_lora_rank": 13}, r"has 32 rows on a rank of tp 2, expected 33 or 33/2"),
    ],
)
def test_latent_attention_of_unknown_sizes(saved: Path, sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    def change(state: State) -> None:
        state["model"][QKV_DOWN.format(0)] = torch.zeros(32, 64)
        args = vars(state["args"])
        for name in MLA_SIZES:
            args[name] = sizes.get(name)

    save = save_again(saved / "etp1" / "legacy", tmp_path / "save", change)
    with pytest.raises(ExportError, match=message):
        read_index(save / ITERATION)


def test_further_tokens_under_their_name_since_0_17(saved: Path, tmp_path: Path) -> None:
    """transformer/multi_token_prediction.py, MultiTokenPredictionLayer: in legacy files of the last stage, with its
    own layers numbered from 0 and experts as the decoder has them."""
    eh_proj = torch.randn(64, 128)
    layer = "mtp.layers.0.mtp_model_layer."

    def change(state: State, path_rank: tuple[int, int]) -> None:
        tp, pp = path_rank
        if pp == 1:
            own = {name: value for name, value in state["model"].items() if name.startswith("decoder.layers.0.")}
            state["model"] |= {name.replace("decoder.layers.0.", layer): value for name, value in own.items()}
            state["model"]["mtp.layers.0.eh_proj.weight"] = eh_proj.chunk(2)[tp].contiguous()

    save = save_with_ranks(saved / "etp1" / "legacy", tmp_path / "save", change)
    expected = expected_tensors(saved / "etp1")
    mtp = {
        name.replace("decoder.layers.1.", "mtp.layers.0.transformer_layer."): value
        for name, value in expected.items()
        if name.startswith("decoder.layers.1.")
    }
    index = read_index(save / ITERATION)
    assert_same(index, expected | mtp | {"mtp.layers.0.eh_proj.weight": eh_proj})
    catalog = SourceCatalog(index.shapes())
    assert catalog.num_layers == 2
    expert = "mtp.layers.{layer}.transformer_layer.mlp.experts.experts.{expert}.linear_fc2.weight"
    found = catalog.find(expert, layer=0, expert=3)
    assert found is not None
    assert found.shape == (64, 128)
