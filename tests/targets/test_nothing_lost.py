"""Every number that decides what a model computes is written into config.json, told in a note, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.conformance import CHECKPOINTS
from support.small_models import model_config

from dist_export import api
from dist_export.errors import ExportError
from dist_export.families.registry import choose_family
from dist_export.models.catalog import SourceCatalog
from dist_export.models.config import ModelConfig, RopeScaling
from dist_export.models.provenance import ResolvedConfig
from dist_export.plan.export import ExportPlan
from dist_export.targets.huggingface import target as huggingface
from dist_export.targets.trtllm import target as trtllm

FOLDER = Path(__file__).parents[1] / "conformance" / "checkpoints"
MODELS = {**{family: checkpoint for checkpoint, family in CHECKPOINTS.items()}, "nemotron": ""}
NEMOTRON = {"normalization": "LayerNorm", "zero_centered_norm": True, "activation": "squared_relu", "gated": False}

NUMBERS: dict[str, float] = {
    "norm_epsilon": 3e-4,
    "rotary_base": 12345.0,
    "rotary_percent": 0.25,
    "max_position_embeddings": 192,
    "query_pre_attn_scalar": 100.0,
    "attn_logit_softcapping": 33.0,
    "final_logit_softcapping": 21.0,
    "moe_top_k": 1,
    "moe_router_scaling_factor": 3.25,
    "glu_offset": 0.375,
    "activation_clamp": 5.5,
    "window_size": 12,
    "vocab_size": 57,
}
SCALINGS = (
    RopeScaling("linear", 4.25),
    RopeScaling("llama3", 9.25, 1.5, 5.5, 48),
    RopeScaling("yarn", 9.25, original_max_position_embeddings=48, beta_fast=30.5, beta_slow=1.5, mscale=0.75,
                mscale_all_dim=0.5),
    RopeScaling("yarn", 9.25, original_max_position_embeddings=48, beta_fast=30.5, beta_slow=1.5),
)  # fmt: skip
CHOICES: dict[str, tuple[object, ...]] = {
    "rotary_interleaved": (True, False),
    "activation": ("gelu", "gelu_tanh", "relu", "squared_relu", "silu", "quick_gelu"),
    "embedding_scaling": (True, False),
    "post_norms": (True, False),
    "qk_norm": (True, False),
    "zero_centered_norm": (True, False),
    "qkv_bias": (True, False),
    "parallel_attention": (True, False),
    "attention_sinks": (True, False),
    "moe_router_pre_softmax": (True, False),
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_router_expert_bias": (True, False),
    "moe_shared_expert_gate": (True, False),
}
WRITTEN_ALWAYS = ("hf", "moe_router_expert_bias")
"""Zeros where the model has none."""


@cache
def model_of(name: str) -> ModelConfig:
    if name == "nemotron":
        config: ModelConfig = model_config(**NEMOTRON, head_size=16, rotary_percent=0.5)
        return config
    return api.open_model(api.Source(checkpoint=FOLDER / MODELS[name])).resolved.config


def plan_of(model: ModelConfig, target: str) -> ExportPlan:
    """Of the first family that the model is of. Raises `ExportError`."""
    resolved, catalog, family = ResolvedConfig(model, {}), SourceCatalog({}), choose_family(model)
    if target == "hf":
        return huggingface.plan_export(family, resolved, catalog, huggingface.HuggingFaceOptions())
    return trtllm.plan_export(family, resolved, catalog, trtllm.TrtllmOptions())


def changed(name: str, target: str, **changes: Any) -> ExportPlan | None:
    """The plan of a changed model; None where it is refused."""
    try:
        return plan_of(replace(model_of(name), **changes), target)
    except ExportError:
        return None


def applies(field: str, model: ModelConfig) -> bool:
    """Whether a field means anything in such a model."""
    if field == "moe_router_pre_softmax":
        return model.num_experts > 0 and model.moe_router_score_function == "softmax"
    if field.startswith("moe_"):
        return model.num_experts > 0
    return model.position_embedding == "rope" or not field.startswith(("rotary_", "rope_"))


def leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def told(plan: ExportPlan, number: float) -> bool:
    notes = " ".join(plan.notes)
    return number in list(leaves(plan.config)) or f"{number:g}" in notes


def content(plan: ExportPlan) -> object:
    """All that a consumer gets to know: fields, notes, and which tensors there are with which arithmetic."""
    config = plan.resolved.config
    sources = [rule.values(config) for rule in plan.family.source_rules if rule.when(config)]
    targets = [(rule.target, rule.values(config)) for rule in plan.planner.rules if rule.when(config)]
    return plan.family.name, plan.config, plan.notes, sources, targets


@pytest.mark.parametrize("target", ["hf", "trtllm"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_written_or_refused(name: str, target: str) -> None:
    if changed(name, target) is None:
        pytest.skip("the target has no class for it")
    lost = []
    for field, number in NUMBERS.items():
        plan = changed(name, target, **{field: number}) if applies(field, model_of(name)) else None
        shown = number + 1 if field == "window_size" else number  # consumers count the token itself
        if plan is not None and not told(plan, shown):
            lost.append(field)
    for scaling in SCALINGS:
        plan = changed(name, target, rope_scaling=scaling)
        numbers = [scaling.factor]
        if scaling.kind != "linear":
            numbers += [scaling.original_max_position_embeddings]
        if scaling.kind == "llama3":
            numbers += [scaling.low_freq_factor, scaling.high_freq_factor]
        if scaling.kind == "yarn":
            numbers += [scaling.beta_fast, scaling.beta_slow]
        if scaling.mscale_all_dim:
            numbers += [scaling.mscale, scaling.mscale_all_dim]
        lost += [f"{scaling.kind}: {number}" for number in numbers if plan is not None and not told(plan, number)]
    assert lost == []


@pytest.mark.parametrize("target", ["hf", "trtllm"])
@pytest.mark.parametrize("name", MODELS)
def test_choices_change_what_is_written_or_are_refused(name: str, target: str) -> None:
    plain = changed(name, target)
    if plain is None:
        pytest.skip("the target has no class for it")
    lost = []
    for field, values in CHOICES.items():
        for value in values:
            if value == getattr(model_of(name), field) or not applies(field, model_of(name)):
                continue
            plan = changed(name, target, **{field: value})
            if plan is not None and content(plan) == content(plain) and (target, field) != WRITTEN_ALWAYS:
                lost.append(f"{field}={value}")
    assert lost == []


@pytest.mark.parametrize("target", ["hf", "trtllm"])
def test_scores_of_gemma_2_are_divided_by_the_head_size_where_no_scalar_is_given(target: str) -> None:
    """Megatron's softmax scale is 1 / sqrt(kv_channels), whatever hidden size / heads is."""
    plan = changed("gemma2", target, query_pre_attn_scalar=None, head_size=24)
    assert plan is not None
    model = plan.resolved.config
    assert model.hidden_size // model.num_attention_heads != 24
    assert plan.config["query_pre_attn_scalar"] == plan.config["head_dim" if target == "hf" else "head_size"] == 24


def test_a_window_that_gpt2_has_not_is_refused() -> None:
    with pytest.raises(ExportError, match="it has no attention window"):
        plan_of(replace(model_of("gpt2"), window_size=7), "hf")
