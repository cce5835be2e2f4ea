"""Megatron names to logical tensors: every spelling of a name, one answer, nothing dropped."""

from __future__ import annotations

from typing import Any

import pytest
from support.small_models import model_config

from dist_export.errors import ExportError
from dist_export.models.catalog import SourceCatalog
from dist_export.models.layout_ops import SAME, LayoutOp, SplitHalves
from dist_export.models.logical import LogicalModel, unexpected_sources
from dist_export.models.megatron import DENSE_GPT
from dist_export.models.rules import SourceRule
from dist_export.models.value_ops import ValueOp
from dist_export.tensors.boxes import Box
from dist_export.tensors.views import Piece, Slab

LAYER = "decoder.layers."
TENSORS: dict[str, tuple[int, ...]] = {
    "embedding.word_embeddings.weight": (16, 8),
    LAYER + "self_attention.linear_qkv.layer_norm_weight": (2, 8),
    LAYER + "self_attention.linear_qkv.weight": (2, 16, 8),
    LAYER + "self_attention.linear_proj.weight": (2, 8, 8),
    LAYER + "mlp.linear_fc1.layer_norm_weight": (2, 8),
    LAYER + "mlp.linear_fc1.weight": (2, 24, 8),
    LAYER + "mlp.linear_fc2.weight": (2, 8, 12),
    "decoder.final_layernorm.weight": (8,),
    "output_layer.weight": (16, 8),
}


def logical_model(tensors: dict[str, tuple[int, ...]], **config: Any) -> LogicalModel:
    catalog = SourceCatalog({name: (shape, "bfloat16") for name, shape in tensors.items()})
    return LogicalModel(catalog, DENSE_GPT, model_config(**config))


def renamed(old: str, new: str) -> dict[str, tuple[int, ...]]:
    return {name.replace(old, new): shape for name, shape in TENSORS.items()}


def test_parts_are_boxes_of_the_stored_tensor() -> None:
    model = logical_model(TENSORS)
    up = model.find("layers.{layer}.mlp.up.weight", layer=1)
    assert up is not None
    assert up.view.pieces == (
        Piece(Box((0, 0), (12, 8)), Slab(LAYER + "mlp.linear_fc1.weight", (1,)), (12, 0)),
    )
    assert (up.dtype, up.values) == ("bfloat16", ())
    key = model.find("layers.{layer}.attention.key.weight", layer=0)
    assert key is not None
    assert [piece.source_start for piece in key.view.pieces] == [(4, 0), (12, 0)]
    assert model.find("layers.{layer}.attention.key.bias", layer=0) is None


@pytest.mark.parametrize(
    ("old", "new", "logical"),
    [
        ("self_attention.linear_qkv.layer_norm_", "input_layernorm.", "layers.{layer}.attention.norm.weight"),
        ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.", "layers.{layer}.mlp.norm.weight"),
        ("decoder.final_layernorm.", "decoder.final_norm.", "final_norm.weight"),
    ],
)
def test_local_and_fused_norm_names_mean_the_same(old: str, new: str, logical: str) -> None:
    views = []
    for tensors in (TENSORS, renamed(old, new)):
        model = logical_model(tensors, zero_centered_norm=True)
        found = model.find(logical, layer=0)
        assert found is not None and found.values == (ValueOp.ADD_ONE,)
        assert not unexpected_sources(model.catalog, DENSE_GPT, model.config)
        views.append(found.view.shape)
    assert views == [(8,), (8,)]


def test_gate_and_up_under_one_key_or_two() -> None:
    two = {name: shape for name, shape in TENSORS.items() if "linear_fc1.weight" not in name}
    two |= {f"{LAYER}mlp.linear_fc1.weight_{half}": (2, 12, 8) for half in "wv"}
    model = logical_model(two)
    for part, half in (("gate", "w"), ("up", "v")):
        found = model.find(f"layers.{{layer}}.mlp.{part}.weight", layer=1)
        assert found is not None
        assert [str(piece.slab) for piece in found.view.pieces] == [f"{LAYER}mlp.linear_fc1.weight_{half}[1]"]
    both = logical_model(TENSORS | two)
    with pytest.raises(ExportError, match=r"weight\[1\] and .*weight_w\[1\] both hold .*gate.weight; keep one of them"):
        both.find("layers.{layer}.mlp.gate.weight", layer=1)


def test_tied_embeddings_feed_the_head() -> None:
    tied = {name: shape for name, shape in TENSORS.items() if name != "output_layer.weight"}
    model = logical_model(tied, tied_embeddings=True)
    head, table = model.find("head.weight"), model.find("embedding.weight")
    assert head is not None and table is not None
    assert head.view == table.view
    assert head.view.shape == (13, 8)
    assert logical_model(tied).find("head.weight") is None


def test_every_source_has_a_place_or_is_named() -> None:
    more = TENSORS | {LAYER + "self_attention.q_layernorm.weight": (2, 2), "decoder.adapter.weight": (8, 8),
                      LAYER + "mlp.linear_fc2.bias": (2, 8)}  # fmt: skip
    model = logical_model(more)
    faults = unexpected_sources(model.catalog, DENSE_GPT, model.config)
    assert faults.messages == [
        "unexpected tensor decoder.adapter.weight",
        "unexpected tensor decoder.layers.{layer}.mlp.linear_fc2.bias (the model's configuration excludes it)",
        "unexpected tensor decoder.layers.{layer}.self_attention.q_layernorm.weight",
    ]


def test_a_misfit_names_the_stored_tensor() -> None:
    model = logical_model(TENSORS | {LAYER + "self_attention.linear_qkv.weight": (2, 18, 8)})
    with pytest.raises(ExportError, match=r"linear_qkv.weight\[1\]: fused qkv has 18 rows, expected 16"):
        model.find("layers.{layer}.attention.query.weight", layer=1)


@pytest.mark.parametrize(("op", "names"), [(SplitHalves(), ("a",)), (SAME, ("a", "b"))])
def test_a_rule_that_makes_another_number_of_tensors_than_it_names(op: LayoutOp, names: tuple[str, ...]) -> None:
    """A mapping of the user's own can have one."""
    catalog = SourceCatalog({"decoder.layers.0.w": ((4, 4), "bfloat16")})
    model = LogicalModel(catalog, (SourceRule("decoder.layers.{layer}.w", names, op),), model_config())
    message = rf"decoder.layers.0.w: its rule makes {3 - len(names)} tensors of it, and names {', '.join(names)}"
    with pytest.raises(ExportError, match=message):
        model.find("a", layer=0)
