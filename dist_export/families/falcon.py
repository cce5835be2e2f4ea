"""Falcon: attention and MLP side by side, LayerNorm, rope, plain gelu; one norm (7B) or one for each (40B, 180B).

NeMo trains it (nemo/collections/nlp/models/language_modeling/megatron/falcon/falcon_decoder_layer.py; both sides'
names are in scripts/nlp_language_modeling/convert_hf_falcon_to_nemo.py). transformers keeps query, key and value in one
tensor, in Megatron's own order.
"""

from __future__ import annotations

from dist_export.families import gpt
from dist_export.models.config import ModelConfig
from dist_export.models.features import PARALLEL_ATTENTION
from dist_export.models.megatron import DENSE_GPT, any_bias, qkv_bias, untied
from dist_export.models.megatron import LAYER as SOURCE_LAYER
from dist_export.models.rules import Condition, Family, Input, Scope, SourceRule, TargetRule
from dist_export.models.shard_ops import ON_FIRST_RANK, ROW
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm.architecture import EngineModel, ReleaseLimit
from dist_export.targets.trtllm.releases import COMMON_KEYS, Keys, Span
from dist_export.targets.trtllm.tables import (
    COLUMN_PARALLEL,
    LAYER,
    LOGICAL,
    EmbeddingSharding,
    ends,
    linear,
    norm,
    qkv,
)


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Falcon-style."""
    gelu = config.activation in ("gelu", "gelu_tanh")
    wanted = (
        (config.parallel_attention, "attention and MLP are not side by side"),
        (not config.zero_centered_norm, "norms are zero-centred"),
        (gelu and not config.gated, f"the MLP is not a plain gelu one ({config.activation})"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
    )
    return gpt.unmet(config) + [reason for holds, reason in wanted if not holds]


def two_norms(config: ModelConfig) -> bool:
    """Attention and MLP have a norm each."""
    return config.separate_mlp_norm


def one_norm(config: ModelConfig) -> bool:
    """Attention and MLP read the output of one norm."""
    return not config.separate_mlp_norm


FUSED = "attention.fused_qkv."
SOURCE_RULES = (
    *DENSE_GPT,
    SourceRule(SOURCE_LAYER + "self_attention.linear_qkv.weight", (LOGICAL + FUSED + "weight",)),
    SourceRule(SOURCE_LAYER + "self_attention.linear_qkv.bias", (LOGICAL + FUSED + "bias",), when=qkv_bias),
)
"""Query, key and value apart for targets that divide them, and together for those that do not."""

ROW_PARALLEL = (ROW, ON_FIRST_RANK)
"""One all-reduce of attention and MLP together follows, so every rank's bias would be added."""


def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """FalconForCausalLM (tensorrt_llm/models/falcon/model.py)."""
    return (
        *ends(embedding),
        *norm(LAYER + "input_layernorm", LOGICAL + "attention.norm"),
        *(_when(two_norms, rule) for rule in norm(LAYER + "mlp_layernorm", LOGICAL + "mlp.norm")),
        TargetRule(LAYER + "attention.qkv.weight", qkv("weight")),
        TargetRule(LAYER + "attention.qkv.bias", qkv("bias"), when=any_bias),
        *linear("attention.dense", "attention.output", ROW_PARALLEL, bias=any_bias),
        *linear("mlp.fc", "mlp.up", COLUMN_PARALLEL, bias=any_bias),
        *linear("mlp.proj", "mlp.down", ROW_PARALLEL, bias=any_bias),
    )


def _when(condition: Condition, rule: TargetRule) -> TargetRule:
    return TargetRule(rule.target, rule.inputs, rule.scope, when=condition)


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """FalconConfig."""
    return {
        "hidden_act": trtllm.PLAIN_ACTIVATIONS[model.activation],
        "bias": any_bias(model),
        "parallel_attention": True,
        "new_decoder_architecture": model.separate_mlp_norm,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
    }


ENGINE = EngineModel(
    name="FalconForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=(
        *trtllm.ANY_CLASS,
        (lambda m: m.norm_epsilon == 1e-5, "its last norm has an epsilon of 1e-5, whatever config.json says"),
        (lambda m: m.head_size * m.num_attention_heads == m.hidden_size, "its head size is hidden size / heads"),
        (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not passed to its attention"),
        (lambda m: m.rope_scaling is None, "rotary scaling is not passed to its attention"),
        (lambda m: not m.rotary_interleaved, "interleaved rotary embeddings are not passed to its attention"),
    ),
    keys=Keys((*COMMON_KEYS, "bias", "parallel_attention", "new_decoder_architecture"), ("share_embedding_table",)),
    release_limits=(
        ReleaseLimit(
            Span("0.12", "0.14"),
            lambda m, layout: m.rotary_base == 10000,
            "a rotary base is not passed to its attention",
        ),
    ),
)

HF_LAYER = "transformer.h.{layer}."


def hf_norm(target: str, logical: str, when: Condition) -> tuple[TargetRule, ...]:
    """A norm of a layer."""
    return tuple(_when(when, rule) for rule in hf_tables.norm(HF_LAYER + target, LOGICAL + logical, bias=True))


TABLE = (
    hf_tables.tensor("transformer.word_embeddings.weight", "embedding.weight", scope=Scope.FIRST),
    *hf_norm("input_layernorm", "attention.norm", one_norm),
    *hf_norm("ln_attn", "attention.norm", two_norms),
    *hf_norm("ln_mlp", "mlp.norm", two_norms),
    TargetRule(HF_LAYER + "self_attention.query_key_value.weight", (Input(LOGICAL + FUSED + "weight"),)),
    TargetRule(
        HF_LAYER + "self_attention.query_key_value.bias",
        (Input(LOGICAL + FUSED + "bias", zeros_for=LOGICAL + FUSED + "weight"),),
        when=any_bias,
    ),
    *hf_tables.linear(HF_LAYER + "self_attention.dense", LOGICAL + "attention.output", bias=any_bias),
    *hf_tables.linear(HF_LAYER + "mlp.dense_h_to_4h", LOGICAL + "mlp.up", bias=any_bias),
    *hf_tables.linear(HF_LAYER + "mlp.dense_4h_to_h", LOGICAL + "mlp.down", bias=any_bias),
    *hf_tables.norm("transformer.ln_f", "final_norm", scope=Scope.LAST, bias=True),
    hf_tables.tensor("lm_head.weight", "head.weight", scope=Scope.LAST, when=untied),
)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """FalconConfig (transformers/models/falcon/configuration_falcon.py). Only its new decoder has grouped queries."""
    grouped = 1 < model.num_query_groups < model.num_attention_heads
    new = model.separate_mlp_norm or grouped
    return {
        "model_type": "falcon",
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_kv_heads": model.num_query_groups,
        "multi_query": model.num_query_groups < model.num_attention_heads,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if model.separate_mlp_norm else 1) if new else None,
        "parallel_attn": True,
        "alibi": False,
        "bias": any_bias(model),
        "activation": hf.ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rotary_base,
        "rope_scaling": hf.rope_scaling(model),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


HF_LIMITS = (
    *hf.ROPE,
    (lambda m: m.head_size * m.num_attention_heads == m.hidden_size, "its head size is hidden size / heads"),
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not expressible"),
)

FALCON = Family(
    name="falcon",
    description="attention and MLP side by side, LayerNorm, rope: Falcon 7B, 40B, 180B",
    unmet=unmet,
    source_rules=SOURCE_RULES,
    architectures={
        "trtllm": (ENGINE,),
        "hf": (HuggingFaceModel(name="FalconForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
    features=frozenset({PARALLEL_ATTENTION}),
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
