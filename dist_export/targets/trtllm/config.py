"""config.json of a TensorRT-LLM checkpoint, from a model configuration and a layout."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import asdict

from dist_export.errors import Faults
from dist_export.models.config import ModelConfig
from dist_export.plan.layout import TargetLayout
from dist_export.targets.trtllm.architecture import EngineModel, Limit
from dist_export.targets.trtllm.tables import EmbeddingSharding

GPUS_PER_NODE = 8  # Mapping's own default; only used for topology hints


class ServingOptions(Struct, frozen=True):
    """What the user chose beyond the model itself."""

    dtype: str
    embedding: EmbeddingSharding


def build_config(
    engine: EngineModel, model: ModelConfig, layout: TargetLayout, options: ServingOptions
) -> dict[str, object]:
    """The contents of config.json. Sizes are global; ranks take their share when they load."""
    return {
        "architecture": engine.name,
        "dtype": options.dtype,
        "logits_dtype": "float32",
        **_sizes(model),
        **_positions(model),
        "norm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_norm,
        "use_parallel_embedding": options.embedding.parallel,
        "embedding_sharding_dim": options.embedding.dim,
        "share_embedding_table": False,
        **engine.fields(model),
        "mapping": _mapping(layout),
        "quantization": NO_QUANTIZATION,
    }


def model_notes(model: ModelConfig) -> list[str]:
    """What the user should know about how TensorRT-LLM will compute this model."""
    notes = []
    if model.activation == "gelu":
        notes.append("the model was trained with exact gelu; TensorRT-LLM computes every gelu as its tanh form")
    if model.window_size:
        where = "" if model.window_layers is None else f" in layers {_numbers(model.window_layers)}"
        notes.append(
            f"attention is limited to a window of {model.window_size + 1} tokens{where}: give it to the runtime "
            "(max_attention_window_size, one number per layer where they differ), the checkpoint cannot say it"
        )
    return notes


def _numbers(flags: tuple[int, ...]) -> str:
    """Layers with a flag, as people count them in config files: from 0."""
    return ", ".join(str(layer) for layer, flag in enumerate(flags) if flag)


def engine_faults(engine: EngineModel, model: ModelConfig, layout: TargetLayout) -> Faults:
    """Why a model, or a layout of it, cannot be served by an architecture. Empty when it can."""
    faults = Faults(f"{engine.name} of TensorRT-LLM cannot express this export ({layout})")
    heads, groups, tp = model.num_attention_heads, model.num_query_groups, layout.tp_size
    if heads % tp:
        faults.add(f"{heads} attention heads do not divide by tp {tp}")
    if groups % tp and tp % groups:
        faults.add(f"{groups} key/value heads neither divide by tp {tp} nor divide it")
    if model.num_experts:
        _check_experts(model, layout, faults)
    elif model.ffn_hidden_size % tp:
        faults.add(f"ffn size {model.ffn_hidden_size} does not divide by tp {tp}")
    faults.extend(message for holds, message in engine.limits if not holds(model))
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


LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _positions(model: ModelConfig) -> dict[str, object]:
    """Position fields. The type is always written: rotary tables are built from this field alone."""
    scaling = None
    if model.rope_scaling is not None:
        names = ("factor",) if model.rope_scaling.kind == "linear" else LLAMA3_NUMBERS
        scaling = asdict(model.rope_scaling)
        scaling = {"type": model.rope_scaling.kind, **{name: scaling[name] for name in names}}
    kind = "rope_gptj" if model.rotary_interleaved else "rope_gpt_neox"
    return {
        "position_embedding_type": kind if model.position_embedding == "rope" else "learned_absolute",
        "rotary_base": model.rotary_base,
        "rotary_scaling": scaling,
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

REPRESENTABLE: tuple[Limit, ...] = (
    (lambda m: m.position_embedding != "none", "a model without position embeddings is not representable"),
    (lambda m: m.activation in PLAIN_ACTIVATIONS, "this activation does not exist there"),
)
NO_QK_NORM: Limit = (lambda m: not m.qk_norm, "q/k norm is not supported for this architecture")
ANY_CLASS: tuple[Limit, ...] = (*REPRESENTABLE, NO_QK_NORM)
DENSE: Limit = (lambda m: m.num_experts == 0, "experts are not supported for this architecture")


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
