"""Qwen3-MoE-style models: Qwen3 with gated experts in place of the MLP."""

from __future__ import annotations

from dist_export.families import mixtral, qwen2, qwen3
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import MOE_GPT, QK_NORMS, qkv_bias
from dist_export.models.rules import Family, TargetRule
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel, Limit
from dist_export.targets.huggingface.tables import LAYER as HF_LAYER
from dist_export.targets.huggingface.tables import tensor
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm.architecture import EngineModel
from dist_export.targets.trtllm.releases import Span
from dist_export.targets.trtllm.tables import LOGICAL, EmbeddingSharding


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Qwen3-MoE-style."""
    wanted = (
        (config.qk_norm, "it has no q/k norm"),
        (not config.linear_bias and not config.qkv_bias, "it has biases"),
        (not config.moe_shared_expert_ffn_hidden_size, "it has shared experts"),
    )
    return mixtral.unmet_base(config) + [reason for holds, reason in wanted if not holds]


def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """QWenForCausalLM with ``qwen_type`` qwen3_moe: its experts are those of Mixtral."""
    return (*mixtral.engine_rules(embedding), *qwen3.QK_NORM_RULES)


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """QWenConfig with experts: ``intermediate_size`` is a dense layer's, which this model has none of."""
    return {
        **qwen3.engine_fields(model),
        **expert_fields(model),
        "qwen_type": "qwen3_moe",
    }


def expert_fields(model: ModelConfig) -> dict[str, object]:
    """What the experts add to QWenConfig; the activation keeps its gated name."""
    return {
        "hidden_act": trtllm.GATED_ACTIVATIONS[model.activation],
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "moe": mixtral.engine_experts(model),
    }


ENGINE = EngineModel(
    name="Qwen3MoeForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=(*qwen3.ENGINE_LIMITS, (lambda m: m.num_experts > 0, "the class has experts")),
    keys=qwen2.KEYS,
    releases=Span("1.1"),
    notes=qwen3.engine_notes,
)

HF_EXPERTS = (
    tensor(HF_LAYER + "mlp.gate.weight", LOGICAL + "router.weight"),
    tensor(HF_LAYER + "mlp.experts.{expert}.gate_proj.weight", LOGICAL + "experts.{expert}.gate.weight"),
    tensor(HF_LAYER + "mlp.experts.{expert}.up_proj.weight", LOGICAL + "experts.{expert}.up.weight"),
    tensor(HF_LAYER + "mlp.experts.{expert}.down_proj.weight", LOGICAL + "experts.{expert}.down.weight"),
)

TABLE = (*hf_tables.ENDS, *qwen2.NORMS, *qwen2.attention(qkv_bias), *qwen3.HF_QK_NORMS, *HF_EXPERTS)


def hf_expert_fields(model: ModelConfig) -> dict[str, object]:
    """Both softmaxes exist there: over all experts, or (``norm_topk_prob``) over those chosen."""
    return {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """Qwen3MoeConfig (transformers/models/qwen3_moe/configuration_qwen3_moe.py)."""
    return {**qwen3.hf_fields(model), **hf_expert_fields(model), "model_type": "qwen3_moe"}


HF_LIMITS: tuple[Limit, ...] = (*qwen3.HF_LIMITS, (lambda m: m.num_experts > 0, "it has experts"))

QWEN3_MOE = Family(
    name="qwen3-moe",
    description="the Llama base with norms on queries and keys and gated experts: Qwen3-MoE",
    unmet=unmet,
    source_rules=(*MOE_GPT, *QK_NORMS),
    architectures={
        "trtllm": (ENGINE,),
        "hf": (HuggingFaceModel(name="Qwen3MoeForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter, under Qwen2's names", "hf": "transformers"},
)
