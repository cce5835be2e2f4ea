"""The table of releases: what an export may hold, and what a person must choose where releases disagree."""

from __future__ import annotations

import re
from typing import Any

import pytest
from msgspec.structs import replace
from support.small_models import model_config

from dist_export.errors import ExportError
from dist_export.families import gpt, llama
from dist_export.plan.layout import TargetLayout
from dist_export.targets.trtllm.architecture import EngineModel, ReleaseLimit, choose_engine
from dist_export.targets.trtllm.config import ServingOptions, build_config, engine_faults, model_notes
from dist_export.targets.trtllm.releases import (
    NESTED_KEYS,
    RELEASES,
    Span,
    check_config,
    parse_release,
    split_layers,
)
from dist_export.targets.trtllm.tables import EmbeddingSharding

NO_STAGES = ReleaseLimit(Span("1.0", "1.0"), lambda model, layout: layout.pp_size == 1, "no stages")
LLAMA, GPT = llama.ENGINE, gpt.ENGINE
GPT_FIELDS: dict[str, Any] = {
    "normalization": "LayerNorm", "activation": "gelu_tanh", "gated": False, "position_embedding": "learned_absolute"
}  # fmt: skip


def config(architecture: EngineModel = LLAMA, **fields: Any) -> dict[str, Any]:
    base = GPT_FIELDS if architecture == GPT else {}
    model = model_config(**{**base, **fields})
    options = ServingOptions("bfloat16", EmbeddingSharding())
    return dict(build_config(architecture, model, TargetLayout(2, 1, (2,)), options))


@pytest.mark.parametrize("architecture", [LLAMA, GPT])
def test_what_is_written_suits_every_release(architecture: EngineModel) -> None:
    written = config(architecture)
    check_config(written, architecture.keys, RELEASES)
    assert set(written) <= {*architecture.keys.required, *architecture.keys.permitted}
    for table, keys in NESTED_KEYS.items():
        assert all(release in keys[key] for key in written[table] for release in RELEASES)


@pytest.mark.parametrize(
    ("table", "key", "refused_by", "accepted_by"),
    [
        ("mapping", "cp_config", "0.16", "0.17"),
        ("mapping", "enable_attention_dp", "0.21", "1.0"),
        ("mapping", "auto_parallel", "1.1", "1.0"),
        ("mapping", "pp_partition", "1.0", "1.1"),
        ("quantization", "use_meta_recipe", "0.14", "0.15"),
        ("quantization", "mamba_ssm_cache_dtype", "1.0", "1.1"),
        ("moe", "moe_intermediate_size", "0.16", "0.14"),
        ("moe", "shared_expert_intermediate_size", "0.15", "0.16"),
    ],
)
def test_forbidden_keys_per_release(table: str, key: str, refused_by: str, accepted_by: str) -> None:
    written = config()
    written[table] = {**written[table], key: None}
    check_config(written, LLAMA.keys, (accepted_by,))
    with pytest.raises(ExportError, match=re.escape(f"TensorRT-LLM {refused_by}: {table}.{key} is refused by")):
        check_config(written, LLAMA.keys, (refused_by,))
    with pytest.raises(ExportError, match=f"does not suit TensorRT-LLM 0.12 to 1.2: .*{key} is refused by .*"):
        check_config(written, LLAMA.keys, RELEASES)


def test_unknown_and_missing_keys_come_together() -> None:
    written = config()
    del written["rotary_base"], written["position_embedding_type"]
    written["mapping"] = {**written["mapping"], "rank": 0}
    written["residual"] = 1
    with pytest.raises(ExportError) as error:
        check_config(written, LLAMA.keys, ("1.0",))
    for part in ("4 faults", "mapping.rank is refused by 1.0", "rotary_base is missing",
                 "position_embedding_type is missing", "residual is not a field of LlamaForCausalLM"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "release"), [("0.14", "0.14"), ("0.14.0", "0.14"), ("v1.0.0rc2", "1.0"), ("1.2.1", "1.2")]
)
def test_releases_as_people_write_them(text: str, release: str) -> None:
    assert parse_release(text) == release


@pytest.mark.parametrize("text", ["1.3.0rc1", "0.11", "2", "", "latest", "0.1.4"])
def test_what_is_no_release(text: str) -> None:
    with pytest.raises(ExportError, match=r"not a TensorRT-LLM release with an engine builder; known: 0.12, .*1.2"):
        parse_release(text)


def test_releases_of_a_class() -> None:
    model, layout = model_config(), TargetLayout(1, 2, (1, 1))
    assert LLAMA.valid_releases(model, layout, "bfloat16", None) == RELEASES
    assert LLAMA.valid_releases(model, layout, "bfloat16", "0.19") == ("0.19",)
    late = replace(LLAMA, releases=Span("1.0"), release_limits=(NO_STAGES,))
    assert late.valid_releases(model, layout, "float16", None) == ("1.1", "1.2")
    assert late.valid_releases(model, TargetLayout(2, 1, (2,)), "float16", None) == ("1.0", "1.1", "1.2")
    with pytest.raises(ExportError, match=r"LlamaForCausalLM of TensorRT-LLM 1.0 cannot [^\n]*: 1 fault\n  - no st"):
        late.valid_releases(model, layout, "float16", "1.0")
    with pytest.raises(ExportError, match=r"the class is in TensorRT-LLM 1.0 to 1.2, not in 0.21"):
        late.valid_releases(model, layout, "float16", "0.21")
    with pytest.raises(ExportError, match="is served in float16, not in float32"):
        replace(LLAMA, dtypes=("float16",)).valid_releases(model, layout, "float32", None)


def test_a_class_that_changed_between_releases() -> None:
    old, new = replace(LLAMA, releases=Span("0.12", "0.15")), replace(LLAMA, releases=Span("0.16", "0.21"))
    assert choose_engine((old, new), None) is new
    assert choose_engine((old, new), "0.14") is old
    assert choose_engine((old, new), "0.16") is new
    with pytest.raises(ExportError, match=r"is in TensorRT-LLM 0.12 to 0.15, 0.16 to 0.21, not in 1.0"):
        choose_engine((old, new), "1.0")


@pytest.mark.parametrize(
    ("num_layers", "pp", "releases", "stages"),
    [
        (8, 4, RELEASES, (2, 2, 2, 2)),
        (7, 1, RELEASES, (7,)),
        (7, 4, ("1.0",), (2, 2, 2, 1)),
        (10, 4, ("1.1", "1.2"), (3, 3, 2, 2)),
        (4, 4, ("0.12",), (1, 1, 1, 1)),
    ],
)
def test_layers_of_stages(num_layers: int, pp: int, releases: tuple[str, ...], stages: tuple[int, ...]) -> None:
    assert split_layers(num_layers, pp, releases) == stages


@pytest.mark.parametrize("releases", [RELEASES, ("0.17",), ("0.21", "1.0")])
def test_an_uneven_split_needs_a_release(releases: tuple[str, ...]) -> None:
    message = (
        r"7 layers do not divide by pp 4: TensorRT-LLM up to 0.17 gives every stage 1 layers and drops the last 3, "
        r"from 1.0 on the first 3 stages take 2. Choose a pp that divides the layers, or --trtllm-version 1.0"
    )
    with pytest.raises(ExportError, match=message):
        split_layers(7, 4, releases)
    with pytest.raises(ExportError, match="pp 8 is more than the model's 7 layers"):
        split_layers(7, 8, releases)


@pytest.mark.parametrize(
    ("activation", "gated", "name"),
    [("gelu", False, "gelu"), ("gelu_tanh", False, "gelu"), ("relu", False, "relu"), ("silu", False, "silu"),
     ("squared_relu", False, "squared-relu"), ("silu", True, "swiglu"), ("gelu", True, "geglu"),
     ("gelu_tanh", True, "geglu")],
)  # fmt: skip
def test_gpt_activation_names(activation: str, gated: bool, name: str) -> None:
    assert config(GPT, activation=activation, gated=gated)["hidden_act"] == name


@pytest.mark.parametrize(("activation", "name"), [("silu", "silu"), ("gelu_tanh", "gelu")])
def test_llama_names_the_activation_inside_its_gated_mlp(activation: str, name: str) -> None:
    assert config(LLAMA, activation=activation)["hidden_act"] == name


@pytest.mark.parametrize(
    ("architecture", "fields", "layout", "message"),
    [
        (LLAMA, {}, (3, 1), "4 attention heads do not divide by tp 3"),
        (LLAMA, {"num_attention_heads": 12, "num_query_groups": 3}, (2, 1), "3 key/value heads neither divide by tp 2"),
        (LLAMA, {"ffn_hidden_size": 13}, (2, 1), "ffn size 13 does not divide by tp 2"),
        (LLAMA, {"rotary_percent": 1.0, "rotary_interleaved": True}, (1, 1), "interleaved rotary embeddings"),
        (LLAMA, {"head_size": 8, "rotary_percent": 0.5}, (1, 1), "partial rotary embeddings are not passed"),
        (LLAMA, {"position_embedding": "learned_absolute"}, (1, 1), "has rotary positions only"),
        (LLAMA, {"gated": False}, (1, 1), "has a gated MLP only"),
        (LLAMA, {"qk_norm": True}, (1, 1), "q/k norm is not supported"),
        (GPT, {"normalization": "RMSNorm"}, (1, 1), "has LayerNorm only, the model has RMSNorm"),
        (GPT, {"activation": "relu", "gated": True}, (1, 1), "only swiglu and geglu are gated there"),
        (GPT, {"activation": "quick_gelu"}, (1, 1), "this activation does not exist there"),
        (GPT, {"position_embedding": "none"}, (1, 1), "without position embeddings is not representable"),
    ],
)
def test_what_a_class_cannot_express(
    architecture: EngineModel, fields: dict[str, Any], layout: tuple[int, int], message: str
) -> None:
    base = GPT_FIELDS if architecture == GPT else {}
    grid = TargetLayout(layout[0], layout[1], (2 // layout[1],) * layout[1])
    faults = engine_faults(architecture, model_config(**{**base, **fields}), grid)
    assert any(message in each for each in faults.messages), faults.messages


def test_notes_about_what_the_target_computes() -> None:
    assert model_notes(model_config()) == []
    gelu, window = model_config(**{**GPT_FIELDS, "activation": "gelu"}), model_config(window_size=128)
    assert "every gelu as its tanh form" in model_notes(gelu)[0]
    assert "window of 129" in model_notes(window)[0]
