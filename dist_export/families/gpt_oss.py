"""gpt-oss: experts with biases and a clamped gated activation, attention sinks, a window in every other layer, yarn.

TensorRT-LLM's engine models compute none of these; its later releases serve the model from a Hugging Face folder.
"""

from __future__ import annotations

from dist_export.models.config import ModelConfig
from dist_export.models.features import BOUNDED_GLU, SINKS, SOME_WINDOWS, YARN
from dist_export.models.layout_ops import SPLIT_HALVES
from dist_export.models.megatron import ATTENTION, EMBEDDINGS, GATED_EXPERTS, LAYER, NORMS
from dist_export.models.rules import Family, Input, Scope, SourceRule, TargetRule
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel, Limit
from dist_export.targets.huggingface.tables import LAYER as HF_LAYER
from dist_export.targets.huggingface.tables import LOGICAL, norm, tensor

_EXPERT, _LOGICAL = LAYER + "mlp.experts.experts.{expert}.", "layers.{layer}.experts.{expert}."

SOURCES = (
    *EMBEDDINGS,
    *NORMS,
    *ATTENTION,
    SourceRule(LAYER + "self_attention.core_attention.softmax_offset", ("layers.{layer}.attention.sinks",)),
    *GATED_EXPERTS,
    SourceRule(LAYER + "mlp.router.bias", ("layers.{layer}.router.bias",)),
    SourceRule(_EXPERT + "linear_fc1.bias", (_LOGICAL + "gate.bias", _LOGICAL + "up.bias"), SPLIT_HALVES),
    SourceRule(_EXPERT + "linear_fc1.bias_w", (_LOGICAL + "gate.bias",)),
    SourceRule(_EXPERT + "linear_fc1.bias_v", (_LOGICAL + "up.bias",)),
    SourceRule(_EXPERT + "linear_fc2.bias", (_LOGICAL + "down.bias",)),
)


def _experts(name: str, *parts: str, transposed: bool = False) -> TargetRule:
    """All experts of a layer in one tensor; gate and up alternate."""
    inputs = tuple(Input(_LOGICAL + part) for part in parts)
    return TargetRule(HF_LAYER + "mlp.experts." + name, inputs, transposed=transposed, interleaved=len(parts) == 2)


TABLE = (
    *tables.ENDS,
    *norm(HF_LAYER + "input_layernorm", LOGICAL + "attention.norm"),
    *tables.ATTENTION,
    tensor(HF_LAYER + "self_attn.sinks", LOGICAL + "attention.sinks"),
    *norm(HF_LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm"),
    tensor(HF_LAYER + "mlp.router.weight", LOGICAL + "router.weight"),
    tensor(HF_LAYER + "mlp.router.bias", LOGICAL + "router.bias"),
    _experts("gate_up_proj", "gate.weight", "up.weight", transposed=True),
    _experts("gate_up_proj_bias", "gate.bias", "up.bias"),
    _experts("down_proj", "down.weight", transposed=True),
    _experts("down_proj_bias", "down.bias"),
    *norm("model.norm", "final_norm", scope=Scope.LAST),
)
"""``gate_up_proj [experts, hidden, 2 x ffn]`` and ``down_proj [experts, ffn, hidden]`` are multiplied from the right,
and a gate's column is followed by its up's (transformers/models/gpt_oss/modeling_gpt_oss.py, `GptOssExperts`)."""


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """GptOssConfig (transformers/models/gpt_oss/configuration_gpt_oss.py)."""
    fields = hf.decoder_fields(model)
    del fields["mlp_bias"]
    windows = [model.has_window(layer) for layer in range(model.num_layers)]
    return {
        "model_type": "gpt_oss",
        **fields,
        "hidden_act": "silu",  # what the class is told; it computes quick gelu
        "attention_bias": True,
        "intermediate_size": model.moe_ffn_hidden_size,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": rope_scaling(model),
        "sliding_window": hf.sliding_window(model),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "swiglu_limit": model.activation_clamp,
    }


def rope_scaling(model: ModelConfig) -> dict[str, object] | None:
    """transformers/modeling_rope_utils.py, ``yarn``."""
    scaling = model.rope_scaling
    names = ("factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings")
    return None if scaling is None else {"rope_type": "yarn", **{name: getattr(scaling, name) for name in names}}


def _yarn(model: ModelConfig) -> bool:
    scaling = model.rope_scaling
    return scaling is not None and scaling.kind == "yarn" and (scaling.mscale, scaling.mscale_all_dim) == (1.0, 0.0)


HF_LIMITS: tuple[Limit, ...] = (
    (lambda m: (m.glu_offset, m.activation_clamp) == (1.0, 7.0), "its activation is clamped at 7 and its offset is 1"),
    (lambda m: m.linear_bias and m.qkv_bias, "it has biases in attention, router and experts"),
    (_yarn, "its rotary scaling is yarn with mscale 1 and mscale_all_dim 0"),
    (lambda m: m.rotary_percent == 1.0 and not m.rotary_interleaved, "its rotary embeddings are whole"),
    (lambda m: m.window_size is not None, "it has an attention window in some layers"),
    (lambda m: not m.qk_norm, "it has no q/k norm"),
    (lambda m: m.moe_layer_freq is None, "it has experts in every layer"),
    (lambda m: not m.moe_shared_expert_ffn_hidden_size, "it has no shared experts"),
    (lambda m: not m.moe_router_pre_softmax, "its router takes the softmax over the chosen experts"),
    (lambda m: not m.moe_router_expert_bias, "its router has no selection bias"),
    (lambda m: not m.moe_router_num_groups, "its router picks among all experts"),
    (lambda m: m.moe_router_scaling_factor in (None, 1.0), "its router's weights add up to one"),
)


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not gpt-oss."""
    score = config.moe_router_score_function
    wanted = (
        (config.num_experts > 0, "it has no experts"),
        (config.attention_sinks, "it has no attention sinks"),
        (config.normalization == "RMSNorm", f"normalization is {config.normalization}, not RMSNorm"),
        (
            config.gated and config.activation == "quick_gelu",
            f"the experts are not gated quick-gelu ones ({config.activation})",
        ),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
        (score == "softmax", f"the router scores by {score}"),
    )
    return [reason for holds, reason in wanted if not holds]


GPT_OSS = Family(
    name="gpt-oss",
    description="attention sinks, alternating windows, yarn, experts with biases and a clamped quick-geglu: gpt-oss",
    unmet=unmet,
    source_rules=SOURCES,
    architectures={
        "hf": (HuggingFaceModel(name="GptOssForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
    witnesses={"hf": "transformers"},
    unserved={"trtllm": "no engine class computes attention sinks or the clamped activation"},
    features=frozenset({SINKS, BOUNDED_GLU, YARN, SOME_WINDOWS}),
)
