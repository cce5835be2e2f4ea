"""config.json and generation_config.json of a Hugging Face folder, as transformers and vLLM read them."""

from __future__ import annotations

from dist_export.errors import Faults
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import any_bias
from dist_export.targets.huggingface.architecture import HuggingFaceModel, Limit

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "squared_relu": "relu2",
    "silu": "silu",
    "quick_gelu": "quick_gelu",
}
"""Our names -> transformers/activations.py, ``ACT2FN``."""


def build_config(architecture: HuggingFaceModel, model: ModelConfig, dtype: str) -> dict[str, object]:
    """The contents of config.json."""
    return {
        "architectures": [architecture.name],
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        **architecture.fields(model),
    }


def generation_config() -> dict[str, object]:
    """generation_config.json. Token ids come from a tokenizer; a checkpoint does not hold them."""
    return {"_from_model_config": True}


def model_faults(architecture: HuggingFaceModel, model: ModelConfig) -> Faults:
    """Why an architecture cannot express a model. Empty when it can."""
    faults = Faults(f"{architecture.name} of transformers cannot express this model")
    faults.extend(message for holds, message in architecture.limits if not holds(model))
    return faults


def decoder_fields(model: ModelConfig) -> dict[str, object]:
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


def rope_scaling(model: ModelConfig) -> dict[str, object] | None:
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


def sliding_window(model: ModelConfig) -> int | None:
    """Tokens that a token sees, itself counted, as transformers/masking_utils.py does; Megatron does not count it."""
    return None if model.window_size is None else model.window_size + 1


ROPE_IN_A_WINDOW: tuple[Limit, ...] = (
    (lambda m: m.position_embedding == "rope", "it has rotary positions only"),
    (lambda m: not m.rotary_interleaved, "interleaved rotary embeddings are not expressible"),
    (lambda m: not m.qk_norm, "it has no q/k norm"),
)
ROPE: tuple[Limit, ...] = (
    *ROPE_IN_A_WINDOW,
    (lambda m: m.window_size is None, "it has no attention window"),
)
DENSE: Limit = (lambda m: m.num_experts == 0, "it has no experts")
