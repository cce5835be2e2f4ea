"""Mistral-style models: the Llama base with an attention window. Without one a model is Mistral's only by name."""

from __future__ import annotations

from dist_export.families import llama
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT
from dist_export.models.rules import Family
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface.architecture import HuggingFaceModel


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Mistral-style."""
    wanted = (
        (not config.linear_bias and not config.qkv_bias, "it has biases"),
        (not config.qk_norm, "it has q/k norm"),
    )
    return llama.unmet(config) + [reason for holds, reason in wanted if not holds]


def has_window(config: ModelConfig) -> bool:
    """The only difference to a Llama model; the releases after the first have none."""
    return config.window_size is not None


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """MistralConfig (transformers/models/mistral/configuration_mistral.py)."""
    fields = llama.hf_fields(model)
    for name in ("attention_bias", "mlp_bias", "rope_scaling"):
        del fields[name]
    return {**fields, "model_type": "mistral", "sliding_window": hf.sliding_window(model)}


HF_LIMITS = (
    *hf.ROPE_IN_A_WINDOW,
    hf.DENSE,
    *llama.HF_LAYER_LIMITS,
    (lambda m: m.rope_scaling is None, "rotary scaling is not expressible"),
    (lambda m: not m.linear_bias and not m.qkv_bias, "it has no biases"),
)

MISTRAL = Family(
    name="mistral",
    description="the Llama base with an attention window, or without if named: Mistral",
    unmet=unmet,
    implied=has_window,
    source_rules=DENSE_GPT,
    architectures={
        "trtllm": (llama.ENGINE,),
        "hf": (HuggingFaceModel(name="MistralForCausalLM", rules=llama.TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
"""TensorRT-LLM serves it with the Llama class; the window is the runtime's business there."""
