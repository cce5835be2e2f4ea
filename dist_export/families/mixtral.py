"""Mixtral-style models: the Llama base with a router and gated SiLU experts in every layer."""

from __future__ import annotations

from dist_export.families import llama
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import MOE_GPT, linear_bias
from dist_export.models.rules import Family, Input, Scope, TargetRule
from dist_export.models.shard_ops import COLUMN, ROW
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.huggingface.tables import LAYER as HF_LAYER
from dist_export.targets.huggingface.tables import tensor
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm.architecture import EngineModel
from dist_export.targets.trtllm.tables import (
    LAYER,
    LOGICAL,
    ROW_PARALLEL,
    EmbeddingSharding,
    decoder_layer,
    ends,
    linear,
)


def unmet_base(config: ModelConfig) -> list[str]:
    """Why a model does not have softmax-routed gated SiLU experts in every layer of a Llama base."""
    wanted = (
        (config.num_experts > 0, "it has no experts"),
        (config.normalization == "RMSNorm", f"normalization is {config.normalization}, not RMSNorm"),
        (config.gated and config.activation == "silu", f"the experts are not gated SiLU ones ({config.activation})"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
        (config.moe_layer_freq is None or all(config.moe_layer_freq), "not every layer has experts"),
        (config.moe_router_score_function == "softmax", f"the router scores by {config.moe_router_score_function}"),
        (not config.moe_router_expert_bias, "the router has an expert bias"),
        (not config.moe_router_num_groups, "the router limits expert groups"),
        (config.moe_router_scaling_factor in (None, 1.0), "the router scales its weights"),
    )
    return [reason for holds, reason in wanted if not holds]


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Mixtral-style."""
    wanted = (
        (not config.linear_bias and not config.qkv_bias, "it has biases"),
        (not config.qk_norm, "it has q/k norm"),
        (not config.moe_shared_expert_ffn_hidden_size, "it has shared experts"),
    )
    return unmet_base(config) + [reason for holds, reason in wanted if not holds]


_EXPERT = LOGICAL + "experts.{expert}."

ENGINE_OUTPUT = linear("attention.dense", "attention.output", ROW_PARALLEL, bias=linear_bias)

ENGINE_EXPERTS = (
    TargetRule(LAYER + "mlp.router.weight", (Input(LOGICAL + "router.weight"),), dtype="float32"),
    TargetRule(LAYER + "mlp.fc.weight", (Input(_EXPERT + "up.weight", COLUMN), Input(_EXPERT + "gate.weight", COLUMN))),
    TargetRule(LAYER + "mlp.proj.weight", (Input(_EXPERT + "down.weight", ROW),)),
)
"""The experts of a rank, stacked (tensorrt_llm/layers/moe.py). Within one the linear half (w3) comes before the
activated one (w1), the inverse of Megatron's order. The router is float32 and whole on every rank."""


def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """MixtralForCausalLM: the Llama class with experts."""
    return (*ends(embedding), *decoder_layer(), *ENGINE_OUTPUT, *ENGINE_EXPERTS)


def engine_experts(model: ModelConfig) -> dict[str, object]:
    """MoeConfig. Megatron's softmax over the chosen experts' logits is RENORMALIZE (1), a softmax over all is NONE (0)
    (tensorrt_llm/layers/moe.py, ``MoeConfig.ExpertScaleNormalizationMode``).
    """
    mode = 0 if model.moe_router_pre_softmax else 1
    return {"num_experts": model.num_experts, "top_k": model.moe_top_k, "normalization_mode": mode}


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """LLaMAConfig with experts: here the activation keeps its gated name, and the ffn size is one expert's."""
    return {
        **llama.engine_fields(model),
        "hidden_act": trtllm.GATED_ACTIVATIONS[model.activation],
        "intermediate_size": model.moe_ffn_hidden_size,
        "moe": engine_experts(model),
    }


ENGINE = EngineModel(
    name="MixtralForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=(*llama.ENGINE_LIMITS, (lambda m: m.num_experts > 0, "the class has experts")),
    keys=llama.KEYS,
)

TABLE = (
    *hf_tables.ENDS,
    *hf_tables.norm(HF_LAYER + "input_layernorm", LOGICAL + "attention.norm"),
    *hf_tables.ATTENTION,
    *hf_tables.norm(HF_LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm"),
    tensor(HF_LAYER + "block_sparse_moe.gate.weight", LOGICAL + "router.weight"),
    tensor(HF_LAYER + "block_sparse_moe.experts.{expert}.w1.weight", LOGICAL + "experts.{expert}.gate.weight"),
    tensor(HF_LAYER + "block_sparse_moe.experts.{expert}.w2.weight", LOGICAL + "experts.{expert}.down.weight"),
    tensor(HF_LAYER + "block_sparse_moe.experts.{expert}.w3.weight", LOGICAL + "experts.{expert}.up.weight"),
    *hf_tables.norm("model.norm", "final_norm", scope=Scope.LAST),
)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """MixtralConfig (transformers/models/mixtral): the chosen experts' weights are normalised to sum to one."""
    fields = llama.hf_fields(model)
    for name in ("attention_bias", "mlp_bias", "rope_scaling"):
        del fields[name]
    return {
        **fields,
        "model_type": "mixtral",
        "intermediate_size": model.moe_ffn_hidden_size,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "sliding_window": hf.sliding_window(model),
    }


HF_LIMITS = (
    *hf.ROPE_IN_A_WINDOW,
    *llama.HF_LAYER_LIMITS,
    (lambda m: m.num_experts > 0, "it has experts"),
    (lambda m: not m.moe_router_pre_softmax, "its router takes the softmax over the chosen experts"),
    (lambda m: m.rope_scaling is None, "rotary scaling is not expressible"),
)

MIXTRAL = Family(
    name="mixtral",
    description="RMSNorm, rope, SwiGLU experts with a softmax router: Mixtral, Megatron GPT MoE on the Llama base",
    unmet=unmet,
    source_rules=MOE_GPT,
    architectures={
        "trtllm": (ENGINE,),
        "hf": (HuggingFaceModel(name="MixtralForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
