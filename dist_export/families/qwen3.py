"""Qwen3-style models: the Llama base with norms on queries and keys and no biases."""

from __future__ import annotations

from dist_export.families import llama, qwen2
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT, QK_NORMS, qkv_bias
from dist_export.models.rules import Family, TargetRule
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.huggingface.tables import LAYER as HF_LAYER
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm.architecture import EngineModel, Limit
from dist_export.targets.trtllm.releases import Span
from dist_export.targets.trtllm.tables import LAYER, LOGICAL, EmbeddingSharding, norm


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Qwen3-style."""
    wanted = (
        (config.qk_norm, "it has no q/k norm"),
        (not config.linear_bias and not config.qkv_bias, "it has biases"),
    )
    return llama.unmet(config) + [reason for holds, reason in wanted if not holds]


QK_NORM_RULES: tuple[TargetRule, ...] = (
    *norm(LAYER + "attention.q_layernorm", LOGICAL + "attention.query_norm"),
    *norm(LAYER + "attention.k_layernorm", LOGICAL + "attention.key_norm"),
)
"""One weight for all heads, whole on every rank (tensorrt_llm/layers/attention.py, ``layernorm_share``)."""


def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """QWenForCausalLM with ``qwen_type`` qwen3."""
    return (*qwen2.engine_rules(embedding), *QK_NORM_RULES)


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """QWenConfig. ``qwen_type`` implies the norms; the general switch stays off, as in the class's own conversions."""
    return {**qwen2.engine_fields(model), "qwen_type": "qwen3", "qk_layernorm": False}


def engine_notes(model: ModelConfig) -> list[str]:
    """The class does not hand its epsilon to the attention layer, whose own is 1e-05 (layers/attention.py)."""
    if model.norm_epsilon == QK_NORM_EPSILON:
        return []
    return [
        f"queries and keys were normed with epsilon {model.norm_epsilon:g}; TensorRT-LLM's class norms them with "
        f"{QK_NORM_EPSILON:g}, whatever config.json says"
    ]


QK_NORM_EPSILON = 1e-5

ENGINE_LIMITS: tuple[Limit, ...] = (
    *qwen2.BASE_LIMITS,
    (lambda m: m.qk_norm, "the class has q/k norm"),
    (lambda m: not m.qkv_bias, "the class has no biases"),
)

ENGINE = EngineModel(
    name="Qwen3ForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=(*ENGINE_LIMITS, trtllm.DENSE),
    keys=qwen2.KEYS,
    releases=Span("1.0"),
    notes=engine_notes,
)

HF_QK_NORMS = (
    hf_tables.tensor(HF_LAYER + "self_attn.q_norm.weight", LOGICAL + "attention.query_norm.weight"),
    hf_tables.tensor(HF_LAYER + "self_attn.k_norm.weight", LOGICAL + "attention.key_norm.weight"),
)

TABLE = (*hf_tables.ENDS, *qwen2.NORMS, *qwen2.attention(qkv_bias), *HF_QK_NORMS, *qwen2.MLP)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """Qwen3Config (transformers/models/qwen3/configuration_qwen3.py)."""
    return {**qwen2.hf_fields(model), "model_type": "qwen3", "attention_bias": False}


HF_LIMITS: tuple[Limit, ...] = (
    *qwen2.HF_BASE_LIMITS,
    (lambda m: m.qk_norm, "it has q/k norm"),
    (lambda m: not m.qkv_bias, "biases on query, key and value would need one on the output"),
)

QWEN3 = Family(
    name="qwen3",
    description="the Llama base with norms on queries and keys: Qwen3",
    unmet=unmet,
    source_rules=(*DENSE_GPT, *QK_NORMS),
    architectures={
        "trtllm": (ENGINE,),
        "hf": (
            HuggingFaceModel(name="Qwen3ForCausalLM", rules=TABLE, fields=hf_fields, limits=(*HF_LIMITS, hf.DENSE)),
        ),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter, under Qwen2's names", "hf": "transformers"},
)
