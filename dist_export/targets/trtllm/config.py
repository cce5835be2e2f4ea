"""config.json of a TensorRT-LLM checkpoint, from a model configuration and a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from dist_export.errors import Faults
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import any_bias
from dist_export.plan.layout import TargetLayout
from dist_export.targets.trtllm.tables import EmbeddingSharding

GPUS_PER_NODE = 8  # Mapping's own default; only used for topology hints


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """What the user chose beyond the model itself."""

    dtype: str
    embedding: EmbeddingSharding


def build_config(
    architecture: str, model: ModelConfig, layout: TargetLayout, options: ServingOptions
) -> dict[str, object]:
    """The contents of config.json. Sizes are global; ranks take their share when they load."""
    return {
        "architecture": architecture,
        "dtype": options.dtype,
        "logits_dtype": "float32",
        **_sizes(model),
        **_positions(model),
        "norm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_norm,
        "use_parallel_embedding": options.embedding.parallel,
        "embedding_sharding_dim": options.embedding.dim,
        "share_embedding_table": False,
        **_FIELDS[architecture](model),
        "mapping": _mapping(layout),
        "quantization": NO_QUANTIZATION,
    }


def model_notes(model: ModelConfig) -> list[str]:
    """What the user should know about how TensorRT-LLM will compute this model."""
    notes = []
    if model.activation == "gelu":
        notes.append("the model was trained with exact gelu; TensorRT-LLM computes every gelu as its tanh form")
    if model.window_size:
        notes.append(
            f"attention is limited to a window of {model.window_size}: give it to the runtime "
            "(max_attention_window_size), the checkpoint cannot say it"
        )
    return notes


def engine_faults(architecture: str, model: ModelConfig, layout: TargetLayout) -> Faults:
    """Why a model, or a layout of it, cannot be served by an architecture. Empty when it can."""
    faults = Faults(f"{architecture} of TensorRT-LLM cannot express this export ({layout})")
    heads, groups, tp = model.num_attention_heads, model.num_query_groups, layout.tp_size
    if heads % tp:
        faults.add(f"{heads} attention heads do not divide by tp {tp}")
    if groups % tp and tp % groups:
        faults.add(f"{groups} key/value heads neither divide by tp {tp} nor divide it")
    if model.num_experts:
        _check_experts(model, layout, faults)
    elif model.ffn_hidden_size % tp:
        faults.add(f"ffn size {model.ffn_hidden_size} does not divide by tp {tp}")
    faults.extend(message for holds, message in _LIMITS[architecture] if not holds(model))
    return faults


def _check_experts(model: ModelConfig, layout: TargetLayout, faults: Faults) -> None:
    if model.num_experts % layout.moe_ep_size:
        faults.add(f"{model.num_experts} experts do not divide by moe ep {layout.moe_ep_size}")
    if model.moe_ffn_hidden_size % layout.moe_tp_size:
        faults.add(f"expert ffn size {model.moe_ffn_hidden_size} does not divide by moe tp {layout.moe_tp_size}")


NO_QUANTIZATION: Mapping[str, object] = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
}


def _sizes(model: ModelConfig) -> dict[str, object]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_size": model.head_size,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
    }


def _positions(model: ModelConfig) -> dict[str, object]:
    """Position fields. The type is always written: rotary tables are built from this field alone."""
    scaling = None
    if model.rope_scaling is not None:
        scaling = asdict(model.rope_scaling)
        scaling["type"] = scaling.pop("kind")
        if scaling["type"] == "linear":  # the other numbers mean nothing there
            scaling = {"type": "linear", "factor": model.rope_scaling.factor}
    kind = "rope_gptj" if model.rotary_interleaved else "rope_gpt_neox"
    return {
        "position_embedding_type": kind if model.position_embedding == "rope" else "learned_absolute",
        "rotary_base": model.rotary_base,
        "rotary_scaling": scaling,
    }


def _gpt_fields(model: ModelConfig) -> dict[str, object]:
    """GPTConfig: the activation keeps its gated name, which is what makes the MLP a gated one."""
    return {
        "gpt_variant": "gpt2",
        "hidden_act": (GATED_ACTIVATIONS if model.gated else PLAIN_ACTIVATIONS)[model.activation],
        "bias": any_bias(model),
        "q_scaling": 1.0,
        "embedding_scale": None,
        "apply_query_key_layer_scaling": False,  # Megatron divides and multiplies back: no net effect
        "rotary_pct": model.rotary_percent,
        "inner_layernorm": False,
        "norm_before_bmm1": False,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 1},
    }


def _llama_fields(model: ModelConfig) -> dict[str, object]:
    """LLaMAConfig: a dense MLP is gated already, so the activation is the plain one inside it."""
    return {
        "hidden_act": PLAIN_ACTIVATIONS[model.activation],
        "mlp_bias": model.linear_bias,
        "attn_bias": any_bias(model),
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "remove_duplicated_kv_heads": False,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
    }


def _mixtral_fields(model: ModelConfig) -> dict[str, object]:
    """LLaMAConfig with experts: here the activation keeps its gated name, and the ffn size is one expert's.

    Megatron's softmax over the chosen experts' logits is RENORMALIZE (1), a softmax over all is NONE (0)
    (tensorrt_llm/layers/moe.py, ``MoeConfig.ExpertScaleNormalizationMode``).
    """
    mode = 0 if model.moe_router_pre_softmax else 1
    return {
        **_llama_fields(model),
        "hidden_act": GATED_ACTIVATIONS[model.activation],
        "intermediate_size": model.moe_ffn_hidden_size,
        "moe": {"num_experts": model.num_experts, "top_k": model.moe_top_k, "normalization_mode": mode},
    }


PLAIN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu",
    "relu": "relu",
    "squared_relu": "squared-relu",
    "silu": "silu",
}
"""Our names -> those of tensorrt_llm/layers and functional.py, ``ACT2FN``; every gelu there is the tanh form."""

GATED_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu"}

_FIELDS: Mapping[str, Callable[[ModelConfig], dict[str, object]]] = {
    "GPTForCausalLM": _gpt_fields,
    "LlamaForCausalLM": _llama_fields,
    "MixtralForCausalLM": _mixtral_fields,
}

Limit = tuple[Callable[[ModelConfig], bool], str]

_ANY_CLASS: tuple[Limit, ...] = (
    (lambda m: m.position_embedding != "none", "a model without position embeddings is not representable"),
    (lambda m: not m.qk_norm, "q/k norm is not supported for this architecture"),
    (lambda m: m.activation in PLAIN_ACTIVATIONS, "this activation does not exist there"),
)
_DENSE: Limit = (lambda m: m.num_experts == 0, "experts are not supported for this architecture")
_LLAMA_BASE: tuple[Limit, ...] = (
    (lambda m: m.normalization == "RMSNorm", "the class has RMSNorm only, the model has LayerNorm"),
    (lambda m: m.gated, "the class has a gated MLP only"),
    (lambda m: m.position_embedding == "rope", "the class has rotary positions only"),
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not passed to its attention"),
    (lambda m: not m.rotary_interleaved, "interleaved rotary embeddings are not passed to its attention"),
)
_LIMITS: Mapping[str, tuple[Limit, ...]] = {
    "GPTForCausalLM": (
        *_ANY_CLASS,
        _DENSE,
        (lambda m: m.normalization == "LayerNorm", "the class has LayerNorm only, the model has RMSNorm"),
        (lambda m: not m.gated or m.activation in GATED_ACTIVATIONS, "only swiglu and geglu are gated there"),
    ),
    "LlamaForCausalLM": (*_ANY_CLASS, *_LLAMA_BASE, _DENSE),
    "MixtralForCausalLM": (*_ANY_CLASS, *_LLAMA_BASE, (lambda m: m.num_experts > 0, "the class has experts")),
}


def _mapping(layout: TargetLayout) -> dict[str, object]:
    """Only keys that every release takes; both moe sizes, since one alone is misread before 1.0."""
    return {
        "world_size": layout.world_size,
        "gpus_per_node": GPUS_PER_NODE,
        "cp_size": 1,
        "tp_size": layout.tp_size,
        "pp_size": layout.pp_size,
        "moe_tp_size": layout.moe_tp_size,
        "moe_ep_size": layout.moe_ep_size,
    }
