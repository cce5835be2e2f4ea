"""GPT-style models: LayerNorm, learned or rotary positions, a plain or gated MLP, biases or none."""

from __future__ import annotations

from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT
from dist_export.models.rules import Family


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not GPT-style."""
    wanted = (
        (config.normalization == "LayerNorm", f"normalization is {config.normalization}, not LayerNorm"),
        (config.num_experts == 0, f"it has {config.num_experts} experts"),
    )
    return [reason for holds, reason in wanted if not holds]


GPT = Family(
    name="gpt",
    description="LayerNorm: GPT-2, GPT-3 and their kin",
    unmet=unmet,
    source_rules=DENSE_GPT,
    architectures={"trtllm": "GPTForCausalLM", "hf": "GPT2LMHeadModel"},
)
