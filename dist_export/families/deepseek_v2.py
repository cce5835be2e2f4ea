"""DeepSeek-V2 and V2-Lite: the DeepSeek-V3 base with a router that scores by softmax and has no expert bias."""

from __future__ import annotations

from dist_export.families import deepseek_v3
from dist_export.models.config import ModelConfig
from dist_export.models.features import LATENT_ATTENTION, YARN
from dist_export.models.rules import Family
from dist_export.targets.huggingface.architecture import HuggingFaceModel, Limit


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not DeepSeek-V2-style."""
    score = config.moe_router_score_function
    return deepseek_v3.unmet_base(config) + ([] if score == "softmax" else [f"the router scores by {score}"])


TABLE = (
    *deepseek_v3.ENDS_RULES,
    *deepseek_v3.LATENT_ATTENTION_RULES,
    *deepseek_v3.EXPERT_RULES,
    *deepseek_v3.DENSE_RULES,
)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """DeepseekV2Config (transformers/models/deepseek_v2/configuration_deepseek_v2.py)."""
    return {
        "model_type": "deepseek_v2",
        **deepseek_v3.common_fields(model),
        "mlp_bias": False,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy" if model.moe_router_group_top_k is None else "group_limited_greedy",
    }


HF_LIMITS: tuple[Limit, ...] = (
    *deepseek_v3.COMMON_LIMITS,
    (lambda m: m.moe_router_pre_softmax, "its router takes the softmax over all experts"),
    (lambda m: not m.moe_router_expert_bias, "its router has no expert bias"),
    (
        # transformers and vLLM rank groups by their best expert; Megatron by as many as a token takes of a group.
        lambda m: m.moe_router_group_top_k is None or m.moe_top_k // m.moe_router_group_top_k == 1,
        "its router picks groups of experts by their best: top-k must be below twice the groups per token",
    ),
)


def hf_notes(model: ModelConfig) -> tuple[str, ...]:
    """Where transformers computes something else than DeepSeek's own code, vLLM and SGLang do."""
    scaling = model.rope_scaling
    if scaling is None or not scaling.mscale_all_dim:
        return deepseek_v3.hf_notes(model)
    return (
        *deepseek_v3.hf_notes(model),
        "scores are scaled by yarn's mscale_all_dim; transformers' own DeepSeek-V2 leaves that out, DeepSeek's code "
        "and vLLM compute it",
    )


DEEPSEEK_V2 = Family(
    name="deepseek-v2",
    description="multi-latent attention, softmax router, shared experts: DeepSeek-V2 and V2-Lite",
    unmet=unmet,
    source_rules=tuple(rule for rule in deepseek_v3.SOURCES if not rule.source.startswith("mtp.")),
    architectures={
        "hf": (
            HuggingFaceModel(
                name="DeepseekV2ForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS, notes=hf_notes
            ),
        ),
    },
    unserved=deepseek_v3.NO_ENGINE,
    witnesses={"hf": "transformers"},
    features=frozenset({LATENT_ATTENTION, YARN}),
)
