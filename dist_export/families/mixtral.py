"""Mixtral-style models: the Llama base with a router and gated SiLU experts in every layer."""

from __future__ import annotations

from dist_export.models.config import ModelConfig
from dist_export.models.megatron import MOE_GPT
from dist_export.models.rules import Family


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Mixtral-style."""
    wanted = (
        (config.num_experts > 0, "it has no experts"),
        (config.normalization == "RMSNorm", f"normalization is {config.normalization}, not RMSNorm"),
        (config.gated and config.activation == "silu", f"the experts are not gated SiLU ones ({config.activation})"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
        (not config.linear_bias and not config.qkv_bias, "it has biases"),
        (not config.qk_norm, "it has q/k norm"),
        (config.moe_layer_freq is None or all(config.moe_layer_freq), "not every layer has experts"),
        (not config.moe_shared_expert_ffn_hidden_size, "it has shared experts"),
        (config.moe_router_score_function == "softmax", f"the router scores by {config.moe_router_score_function}"),
        (not config.moe_router_expert_bias, "the router has an expert bias"),
        (not config.moe_router_num_groups, "the router limits expert groups"),
        (config.moe_router_scaling_factor in (None, 1.0), "the router scales its weights"),
    )
    return [reason for holds, reason in wanted if not holds]


MIXTRAL = Family(
    name="mixtral",
    description="RMSNorm, rope, SwiGLU experts with a softmax router: Mixtral, Megatron GPT MoE on the Llama base",
    unmet=unmet,
    source_rules=MOE_GPT,
    architectures={"trtllm": "MixtralForCausalLM", "hf": "MixtralForCausalLM"},
)
