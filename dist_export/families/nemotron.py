"""GPT-Next and Nemotron: zero-centred LayerNorm, squared ReLU, partly rotary positions."""

from __future__ import annotations

from dist_export.models import gpt
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT
from dist_export.models.rules import Family


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Nemotron-style."""
    wanted = (
        (config.zero_centered_norm, "norms are not zero-centred"),
        (config.activation == "squared_relu" and not config.gated, f"the activation is {config.activation}"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
    )
    return gpt.unmet(config) + [reason for holds, reason in wanted if not holds]


NEMOTRON = Family(
    name="nemotron",
    description="zero-centred LayerNorm, squared ReLU, rope: GPT-Next, Nemotron-3/4, Minitron",
    unmet=unmet,
    source_rules=DENSE_GPT,
    architectures={"trtllm": "GPTForCausalLM", "hf": "NemotronForCausalLM"},
)
