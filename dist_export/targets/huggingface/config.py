"""config.json and generation_config.json of a Hugging Face folder, as transformers and vLLM read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dist_export.errors import Faults
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import any_bias

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "squared_relu": "relu2",
    "silu": "silu",
    "quick_gelu": "quick_gelu",
}
"""Our names -> transformers/activations.py, ``ACT2FN``."""


def build_config(architecture: str, model: ModelConfig, dtype: str) -> dict[str, object]:
    """The contents of config.json."""
    return {
        "architectures": [architecture],
        **_FIELDS[architecture](model),
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def generation_config() -> dict[str, object]:
    """generation_config.json. Token ids come from a tokenizer; a checkpoint does not hold them."""
    return {"_from_model_config": True}


def model_faults(architecture: str, model: ModelConfig) -> Faults:
    """Why an architecture cannot express a model. Empty when it can."""
    faults = Faults(f"{architecture} of transformers cannot express this model")
    faults.extend(message for holds, message in _LIMITS[architecture] if not holds(model))
    return faults


def _decoder_fields(model: ModelConfig) -> dict[str, object]:
    """Fields shared by the models with ``model.layers``."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_size,
        "hidden_act": ACTIVATIONS[model.activation],
        "max_position_embeddings": model.max_position_embeddings,
        "attention_bias": any_bias(model),
        "mlp_bias": model.linear_bias,
        "attention_dropout": 0.0,
        "rope_theta": model.rotary_base,
    }


def _rope_scaling(model: ModelConfig) -> dict[str, object] | None:
    """transformers/modeling_rope_utils.py: ``linear`` and ``llama3``."""
    scaling = model.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _llama_fields(model: ModelConfig) -> dict[str, object]:
    return {
        "model_type": "llama",
        **_decoder_fields(model),
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": _rope_scaling(model),
    }


def _mixtral_fields(model: ModelConfig) -> dict[str, object]:
    """transformers/models/mixtral: the chosen experts' weights are normalised to sum to one."""
    fields = _llama_fields(model)
    for name in ("attention_bias", "mlp_bias", "rope_scaling"):
        del fields[name]
    return {
        **fields,
        "model_type": "mixtral",
        "intermediate_size": model.moe_ffn_hidden_size,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "sliding_window": None,
    }


def _nemotron_fields(model: ModelConfig) -> dict[str, object]:
    return {
        "model_type": "nemotron",
        **_decoder_fields(model),
        "norm_eps": model.norm_epsilon,
        "partial_rotary_factor": model.rotary_percent,
    }


def _gpt2_fields(model: ModelConfig) -> dict[str, object]:
    return {
        "model_type": "gpt2",
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_positions": model.max_position_embeddings,
        "activation_function": "gelu" if model.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon,
        "scale_attn_weights": True,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


_FIELDS: Mapping[str, Callable[[ModelConfig], dict[str, object]]] = {
    "LlamaForCausalLM": _llama_fields,
    "MixtralForCausalLM": _mixtral_fields,
    "NemotronForCausalLM": _nemotron_fields,
    "GPT2LMHeadModel": _gpt2_fields,
}

Limit = tuple[Callable[[ModelConfig], bool], str]

_ROPE: tuple[Limit, ...] = (
    (lambda m: m.position_embedding == "rope", "it has rotary positions only"),
    (lambda m: not m.rotary_interleaved, "interleaved rotary embeddings are not expressible"),
    (lambda m: not m.qk_norm, "it has no q/k norm"),
    (lambda m: m.window_size is None, "it has no attention window"),
)
_DENSE: Limit = (lambda m: m.num_experts == 0, "it has no experts")
_LLAMA_BASE: tuple[Limit, ...] = (
    (lambda m: m.normalization == "RMSNorm", "it has RMSNorm only"),
    (lambda m: m.gated, "it has a gated MLP only"),
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not expressible"),
)
_LIMITS: Mapping[str, tuple[Limit, ...]] = {
    "LlamaForCausalLM": (*_ROPE, *_LLAMA_BASE, _DENSE),
    "MixtralForCausalLM": (
        *_ROPE,
        *_LLAMA_BASE,
        (lambda m: m.num_experts > 0, "it has experts"),
        (lambda m: not m.moe_router_pre_softmax, "its router takes the softmax over the chosen experts"),
        (lambda m: m.rope_scaling is None, "rotary scaling is not expressible"),
    ),
    "NemotronForCausalLM": (
        *_ROPE,
        _DENSE,
        (lambda m: m.normalization == "LayerNorm" and m.zero_centered_norm, "its norms are zero-centred LayerNorm"),
        (lambda m: not m.gated, "its MLP is not gated"),
        (lambda m: m.rope_scaling is None, "rotary scaling is not expressible"),
    ),
    "GPT2LMHeadModel": (
        (lambda m: m.position_embedding == "learned_absolute", "it has learned positions only"),
        (lambda m: m.normalization == "LayerNorm", "it has LayerNorm only"),
        (lambda m: not m.gated, "its MLP is not gated"),
        (lambda m: m.activation in ("gelu", "gelu_tanh"), "its activation is a gelu"),
        (lambda m: m.num_query_groups == m.num_attention_heads, "it has as many key/value heads as query heads"),
        (lambda m: m.head_size * m.num_attention_heads == m.hidden_size, "its head size is hidden size / heads"),
        (lambda m: not m.qk_norm, "it has no q/k norm"),
        (lambda m: m.num_experts == 0, "it has no experts"),
    ),
}
