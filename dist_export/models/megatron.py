"""Source rules shared by the families: how Megatron-Core's GPTModel names its tensors.

Key names are those of a distributed checkpoint, where the local spec maps its norms to the names of
the fused TransformerEngine spec (megatron/core/models/gpt/gpt_layer_specs.py,
``sharded_state_dict_keys_map``); the unfused names are kept by legacy files and by some specs.
"""

from __future__ import annotations

from dist_export.models.config import ModelConfig
from dist_export.models.layout_ops import SPLIT_HALVES, SPLIT_INTERLEAVED, SPLIT_QKV, TrimVocabulary
from dist_export.models.rules import SourceRule
from dist_export.models.value_ops import plus_one_if_zero_centered

LAYER = "decoder.layers.{layer}."


def tied(config: ModelConfig) -> bool:
    return config.tied_embeddings


def untied(config: ModelConfig) -> bool:
    return not config.tied_embeddings


def gated(config: ModelConfig) -> bool:
    return config.gated


def not_gated(config: ModelConfig) -> bool:
    return not config.gated


def learned_positions(config: ModelConfig) -> bool:
    return config.position_embedding == "learned_absolute"


def layer_norm(config: ModelConfig) -> bool:
    return config.normalization == "LayerNorm"


def linear_bias(config: ModelConfig) -> bool:
    return config.linear_bias


def qkv_bias(config: ModelConfig) -> bool:
    return config.qkv_bias


def any_bias(config: ModelConfig) -> bool:
    """Some linear layer has a bias. Targets have one switch for several layers: those without one get zeros."""
    return config.qkv_bias or config.linear_bias


def expert_blocks(config: ModelConfig) -> bool:
    """Rows of gate and up alternate in the experts' fc1."""
    return config.moe_glu_interleave_size > 0


def expert_halves(config: ModelConfig) -> bool:
    """The experts' fc1 is gate, then up."""
    return not expert_blocks(config)


def norm_rules(sources: tuple[str, ...], logical: str) -> tuple[SourceRule, ...]:
    """Weight and bias of a norm that any one of `sources` may hold (without ``weight``/``bias``)."""
    return tuple(
        rule
        for source in sources
        for rule in (
            SourceRule(f"{source}weight", (f"{logical}.weight",), values=plus_one_if_zero_centered),
            SourceRule(f"{source}bias", (f"{logical}.bias",), when=layer_norm),
        )
    )


EMBEDDINGS = (
    SourceRule("embedding.word_embeddings.weight", ("embedding.weight",), TrimVocabulary(), when=untied),
    SourceRule("embedding.word_embeddings.weight", ("embedding.weight", "head.weight"), TrimVocabulary(2), when=tied),
    SourceRule("embedding.position_embeddings.weight", ("position_embedding.weight",), when=learned_positions),
    SourceRule("output_layer.weight", ("head.weight",), TrimVocabulary(), when=untied),
)

NORMS = (
    *norm_rules(
        (LAYER + "self_attention.linear_qkv.layer_norm_", LAYER + "input_layernorm."), "layers.{layer}.attention.norm"
    ),
    *norm_rules((LAYER + "mlp.linear_fc1.layer_norm_", LAYER + "pre_mlp_layernorm."), "layers.{layer}.mlp.norm"),
    *norm_rules(("decoder.final_layernorm.", "decoder.final_norm."), "final_norm"),
)

QK_NORMS = (
    *norm_rules((LAYER + "self_attention.q_layernorm.",), "layers.{layer}.attention.query_norm"),
    *norm_rules((LAYER + "self_attention.k_layernorm.",), "layers.{layer}.attention.key_norm"),
)
"""Norms of every query and key head, with one weight for all heads."""

_QKV = tuple(f"layers.{{layer}}.attention.{part}." for part in ("query", "key", "value"))

ATTENTION = (
    SourceRule(LAYER + "self_attention.linear_qkv.weight", tuple(part + "weight" for part in _QKV), SPLIT_QKV),
    SourceRule(
        LAYER + "self_attention.linear_qkv.bias", tuple(part + "bias" for part in _QKV), SPLIT_QKV, when=qkv_bias
    ),
    SourceRule(LAYER + "self_attention.linear_proj.weight", ("layers.{layer}.attention.output.weight",)),
    SourceRule(
        LAYER + "self_attention.linear_proj.bias", ("layers.{layer}.attention.output.bias",), when=linear_bias
    ),
)

_GATE_UP = ("layers.{layer}.mlp.gate.", "layers.{layer}.mlp.up.")

MLP = (
    SourceRule(
        LAYER + "mlp.linear_fc1.weight", tuple(part + "weight" for part in _GATE_UP), SPLIT_HALVES, when=gated
    ),
    SourceRule(LAYER + "mlp.linear_fc1.weight_w", (_GATE_UP[0] + "weight",), when=gated),
    SourceRule(LAYER + "mlp.linear_fc1.weight_v", (_GATE_UP[1] + "weight",), when=gated),
    SourceRule(LAYER + "mlp.linear_fc1.bias", tuple(part + "bias" for part in _GATE_UP), SPLIT_HALVES, when=gated),
    SourceRule(LAYER + "mlp.linear_fc1.bias_w", (_GATE_UP[0] + "bias",), when=gated),
    SourceRule(LAYER + "mlp.linear_fc1.bias_v", (_GATE_UP[1] + "bias",), when=gated),
    SourceRule(LAYER + "mlp.linear_fc1.weight", ("layers.{layer}.mlp.up.weight",), when=not_gated),
    SourceRule(LAYER + "mlp.linear_fc1.bias", ("layers.{layer}.mlp.up.bias",), when=not_gated),
    SourceRule(LAYER + "mlp.linear_fc2.weight", ("layers.{layer}.mlp.down.weight",)),
    SourceRule(LAYER + "mlp.linear_fc2.bias", ("layers.{layer}.mlp.down.bias",), when=linear_bias),
)

ROUTER = SourceRule(LAYER + "mlp.router.weight", ("layers.{layer}.router.weight",))

_EXPERT = LAYER + "mlp.experts.experts.{expert}."
_EXPERT_GATE_UP = ("layers.{layer}.experts.{expert}.gate.weight", "layers.{layer}.experts.{expert}.up.weight")

GATED_EXPERTS = (
    ROUTER,
    SourceRule(_EXPERT + "linear_fc1.weight", _EXPERT_GATE_UP, SPLIT_HALVES, when=expert_halves),
    SourceRule(_EXPERT + "linear_fc1.weight_w", _EXPERT_GATE_UP[:1], when=expert_halves),
    SourceRule(_EXPERT + "linear_fc1.weight_v", _EXPERT_GATE_UP[1:], when=expert_halves),
    SourceRule(_EXPERT + "linear_fc1.weight", _EXPERT_GATE_UP, SPLIT_INTERLEAVED, when=expert_blocks),
    SourceRule(_EXPERT + "linear_fc2.weight", ("layers.{layer}.experts.{expert}.down.weight",)),
)
"""A router and gated experts without biases, however they were grouped in training."""

_SHARED = LAYER + "mlp.shared_experts."
_SHARED_GATE_UP = ("layers.{layer}.shared_expert.gate.weight", "layers.{layer}.shared_expert.up.weight")

SHARED_EXPERT = (
    SourceRule(_SHARED + "linear_fc1.weight", _SHARED_GATE_UP, SPLIT_HALVES),
    SourceRule(_SHARED + "linear_fc1.weight_w", _SHARED_GATE_UP[:1]),
    SourceRule(_SHARED + "linear_fc1.weight_v", _SHARED_GATE_UP[1:]),
    SourceRule(_SHARED + "linear_fc2.weight", ("layers.{layer}.shared_expert.down.weight",)),
)
"""A gated expert that every token goes to."""

SHARED_EXPERT_GATE = SourceRule(_SHARED + "gate_weight", ("layers.{layer}.shared_expert_gate.weight",))
"""[1, hidden]: the sigmoid of its product scales what the shared expert returns (transformer/moe/shared_experts.py)."""

MOE_GPT = (*EMBEDDINGS, *NORMS, *ATTENTION, *GATED_EXPERTS)
"""A GPTModel whose layers all have experts."""

DENSE_GPT = (*EMBEDDINGS, *NORMS, *ATTENTION, *MLP)
"""A dense GPTModel, whatever its norm, activation and biases."""
