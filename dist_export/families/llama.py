"""Llama-style models: RMSNorm, rotary positions, a gated SiLU MLP. Llama 2 and 3.x, Mistral and their kin."""

from __future__ import annotations

from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT
from dist_export.models.rules import Family


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Llama-style."""
    wanted = (
        (config.normalization == "RMSNorm", f"normalization is {config.normalization}, not RMSNorm"),
        (config.gated and config.activation == "silu", f"the MLP is not a gated SiLU one ({config.activation})"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
        (config.num_experts == 0, f"it has {config.num_experts} experts"),
    )
    return [reason for holds, reason in wanted if not holds]


LLAMA = Family(
    name="llama",
    description="RMSNorm, rope, SwiGLU: Llama 2/3.x, Mistral",
    unmet=unmet,
    source_rules=DENSE_GPT,
    architectures={"trtllm": "LlamaForCausalLM", "hf": "LlamaForCausalLM"},
)
