"""Gemma 2: Gemma with norms after attention and MLP, capped scores and logits, and windows in every second layer.

NeMo and Megatron-Bridge train it (megatron/bridge/models/gemma/gemma2_bridge.py names both sides); the norms that
follow a linear layer are parts of it there (``linear_proj.post_layernorm``).
"""

from __future__ import annotations

from dist_export.families import gemma
from dist_export.models.config import ModelConfig
from dist_export.models.features import (
    CAPPED_LOGITS,
    CAPPED_SCORES,
    EMBEDDING_SCALING,
    POST_NORMS,
    QUERY_SCALAR,
    SOME_WINDOWS,
)
from dist_export.models.megatron import DENSE_GPT, LAYER, norm_rules
from dist_export.models.rules import Family, TargetRule
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.trtllm.architecture import EngineModel
from dist_export.targets.trtllm.releases import Keys, Span
from dist_export.targets.trtllm.tables import LAYER as ENGINE_LAYER
from dist_export.targets.trtllm.tables import LOGICAL, EmbeddingSharding, ends, norm, qkv


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not of the Gemma 2 kind."""
    return gemma.unmet(config) + ([] if config.post_norms else ["no norms follow attention and MLP"])


def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """Gemma2ForCausalLM (tensorrt_llm/models/gemma/model.py): ``post_layernorm`` is attention's here."""
    gemma.check_embedding(embedding)
    return (
        *ends(embedding),
        *norm(ENGINE_LAYER + "input_layernorm", LOGICAL + "attention.norm"),
        TargetRule(ENGINE_LAYER + "attention.qkv.weight", qkv("weight")),
        *norm(ENGINE_LAYER + "post_layernorm", LOGICAL + "attention.post_norm"),
        *norm(ENGINE_LAYER + "pre_feedforward_layernorm", LOGICAL + "mlp.norm"),
        *norm(ENGINE_LAYER + "post_feedforward_layernorm", LOGICAL + "mlp.post_norm"),
        *gemma.MLP,
    )


def capping_fields(model: ModelConfig) -> dict[str, object]:
    """Fields that both targets call the same. The scalar is a whole number where it can be one."""
    scalar = model.head_size if model.query_pre_attn_scalar is None else model.query_pre_attn_scalar
    return {
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": model.attn_logit_softcapping,
        "final_logit_softcapping": model.final_logit_softcapping,
    }


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """GemmaConfig; windows are the runtime's business."""
    return {**gemma.engine_fields(model), **capping_fields(model)}


ENGINE = EngineModel(
    name="Gemma2ForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=gemma.ENGINE_LIMITS,
    keys=Keys(
        (*gemma.KEYS.required, "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        gemma.KEYS.permitted,
    ),
    releases=Span("0.13"),
    release_limits=gemma.RELEASE_LIMITS,
)

TABLE = (
    *gemma.HF_COMMON,
    *gemma.hf_norm("post_attention_layernorm", "attention.post_norm"),
    *gemma.hf_norm("pre_feedforward_layernorm", "mlp.norm"),
    *gemma.hf_norm("post_feedforward_layernorm", "mlp.post_norm"),
)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """Gemma2Config (transformers/models/gemma2/configuration_gemma2.py). A model without windows gets one that is
    never left: older releases need a number."""
    kinds = {True: "sliding_attention", False: "full_attention"}
    return {
        **gemma.hf_fields(model),
        "model_type": "gemma2",
        **capping_fields(model),
        "sliding_window": hf.sliding_window(model) or model.max_position_embeddings,
        "layer_types": [kinds[model.has_window(layer)] for layer in range(model.num_layers)],
    }


GEMMA2 = Family(
    name="gemma2",
    description="Gemma with norms on both sides, capped scores and logits, windows in every second layer: Gemma 2",
    unmet=unmet,
    source_rules=(
        *DENSE_GPT,
        *norm_rules((LAYER + "self_attention.linear_proj.post_layernorm.",), "layers.{layer}.attention.post_norm"),
        *norm_rules((LAYER + "mlp.linear_fc2.post_layernorm.",), "layers.{layer}.mlp.post_norm"),
    ),
    architectures={
        "trtllm": (ENGINE,),
        "hf": (
            HuggingFaceModel(
                name="Gemma2ForCausalLM",
                rules=TABLE,
                fields=hf_fields,
                limits=(*hf.ROPE_IN_A_WINDOW, *gemma.HF_ANY),
            ),
        ),
    },
    features=frozenset({EMBEDDING_SCALING, POST_NORMS, QUERY_SCALAR, CAPPED_SCORES, CAPPED_LOGITS, SOME_WINDOWS}),
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
