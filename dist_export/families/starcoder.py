"""StarCoder-style models (GPTBigCode): LayerNorm, learned positions, multi-query attention, a plain gelu MLP."""

from __future__ import annotations

from msgspec.structs import replace

from dist_export.families import gpt
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT
from dist_export.models.rules import Family
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface.architecture import HuggingFaceModel


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not StarCoder-style."""
    wanted = (
        (config.num_query_groups == 1 < config.num_attention_heads, f"it has {config.num_query_groups} query groups"),
        (not config.zero_centered_norm, "norms are zero-centred"),
        (config.activation in ("gelu", "gelu_tanh") and not config.gated, "the MLP is not a plain gelu one"),
        (config.position_embedding == "learned_absolute", f"positions are {config.position_embedding}, not learned"),
    )
    return gpt.unmet(config) + [reason for holds, reason in wanted if not holds]


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """GPTConfig; the variant is a hint for converters, and the activation keeps the name that they give it."""
    fields = {**gpt.engine_fields(model), "gpt_variant": "starcoder"}
    return fields | ({"hidden_act": "gelu_pytorch_tanh"} if model.activation == "gelu_tanh" else {})


TABLE = gpt.hf_table(transposed=False)
"""GPT-2's names, but plain ``[out, in]`` weights: transformers/models/gpt_bigcode/modeling_gpt_bigcode.py."""


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """GPTBigCodeConfig (transformers/models/gpt_bigcode/configuration_gpt_bigcode.py)."""
    return {
        "model_type": "gpt_bigcode",
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_positions": model.max_position_embeddings,
        "activation_function": hf.ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "multi_query": True,
        "num_key_value_heads": 1,
        "scale_attn_weights": True,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


HF_LIMITS = (
    (lambda m: m.position_embedding == "learned_absolute", "it has learned positions only"),
    (lambda m: m.normalization == "LayerNorm" and not m.zero_centered_norm, "its norms are plain LayerNorm"),
    (lambda m: not m.gated, "its MLP is not gated"),
    (lambda m: m.num_query_groups == 1, "it has one key/value head"),
    (lambda m: m.head_size * m.num_attention_heads == m.hidden_size, "its head size is hidden size / heads"),
    (lambda m: not m.qk_norm, "it has no q/k norm"),
    (lambda m: m.window_size is None, "it has no attention window"),
    hf.DENSE,
)

STARCODER = Family(
    name="starcoder",
    description="LayerNorm, learned positions, multi-query attention: StarCoder (GPTBigCode)",
    unmet=unmet,
    source_rules=DENSE_GPT,
    architectures={
        "trtllm": (replace(gpt.ENGINE, fields=engine_fields),),
        "hf": (HuggingFaceModel(name="GPTBigCodeForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
