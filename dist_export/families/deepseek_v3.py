"""DeepSeek-V3 and its kin (R1, Moonlight, Kimi-K2): multi-latent attention, a sigmoid router that picks groups of
experts first, shared experts, dense layers before the others, layers that predict further tokens."""

from __future__ import annotations

from msgspec.structs import replace

from dist_export.models.config import ModelConfig
from dist_export.models.features import LATENT_ATTENTION, MTP, YARN
from dist_export.models.megatron import EMBEDDINGS, GATED_EXPERTS, LAYER, MLP, NORMS, SHARED_EXPERT, norm_rules
from dist_export.models.rules import Family, Input, Scope, SourceRule, TargetRule
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface.architecture import HuggingFaceModel, Limit
from dist_export.targets.huggingface.tables import ENDS, LOGICAL, norm, tensor
from dist_export.targets.huggingface.tables import LAYER as HF_LAYER

# --- source -----------------------------------------------------------------------------------------------------------

_ATTENTION = LAYER + "self_attention."

LATENT_SOURCES = (
    *(
        SourceRule(f"{_ATTENTION}linear_{source}.weight", (f"layers.{{layer}}.attention.{logical}.weight",))
        for source, logical in (
            ("q_proj", "query"),
            ("q_down_proj", "query_down"),
            ("q_up_proj", "query_up"),
            ("kv_down_proj", "key_value_down"),
            ("kv_up_proj", "key_value_up"),
            ("proj", "output"),
        )
    ),
    *norm_rules(
        (_ATTENTION + "linear_q_up_proj.layer_norm_", _ATTENTION + "q_layernorm."),
        "layers.{layer}.attention.query_norm",
    ),
    *norm_rules(
        (_ATTENTION + "linear_kv_up_proj.layer_norm_", _ATTENTION + "kv_layernorm."),
        "layers.{layer}.attention.key_value_norm",
    ),
)
"""Multi-latent attention (megatron/core/transformer/multi_latent_attention.py): the fused norms of TransformerEngine's
layers, then those of the local ones."""

EXPERT_BIAS = SourceRule(LAYER + "mlp.router.expert_bias", ("layers.{layer}.router.expert_bias",))

_DECODER_LAYER = (
    *(rule for rule in NORMS if rule.source.startswith(LAYER)),
    *LATENT_SOURCES,
    *MLP,
    *GATED_EXPERTS,
    *SHARED_EXPERT,
    EXPERT_BIAS,
)


def _mtp_sources() -> tuple[SourceRule, ...]:
    """A layer that predicts a further token: a decoder layer behind a projection of two norms' outputs
    (multi_token_prediction.py, `MultiTokenPredictionLayer`; `mtp_model_layer` in files of 0.17 on that are not
    distributed checkpoints)."""
    head = "mtp.layers.{layer}."
    inner = tuple(
        replace(
            rule,
            source=rule.source.replace(LAYER, f"{head}{module}."),
            logical=tuple(name.replace("layers.", "mtp.", 1) for name in rule.logical),
        )
        for module in ("transformer_layer", "mtp_model_layer")
        for rule in _DECODER_LAYER
    )
    return (
        *norm_rules((head + "enorm.",), "mtp.{layer}.embedding_norm"),
        *norm_rules((head + "hnorm.",), "mtp.{layer}.hidden_norm"),
        SourceRule(head + "eh_proj.weight", ("mtp.{layer}.projection.weight",)),
        *norm_rules((head + "final_layernorm.",), "mtp.{layer}.final_norm"),
        *inner,
    )


SOURCES = (
    *EMBEDDINGS,
    *(rule for rule in NORMS if not rule.source.startswith(LAYER)),
    *_DECODER_LAYER,
    *_mtp_sources(),
)

# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _dense(config: ModelConfig, layer: int) -> bool:
    return not config.has_experts(layer)


def _experts(config: ModelConfig, layer: int) -> bool:
    return config.has_experts(layer)


def _low_rank_queries(config: ModelConfig) -> bool:
    return config.q_lora_rank > 0


def _whole_queries(config: ModelConfig) -> bool:
    return not config.q_lora_rank


_QUERY_LATENT = (
    tensor(HF_LAYER + "self_attn.q_a_proj.weight", LOGICAL + "attention.query_down.weight"),
    *norm(HF_LAYER + "self_attn.q_a_layernorm", LOGICAL + "attention.query_norm"),
    tensor(HF_LAYER + "self_attn.q_b_proj.weight", LOGICAL + "attention.query_up.weight"),
)

LATENT_ATTENTION_RULES = (
    *norm(HF_LAYER + "input_layernorm", LOGICAL + "attention.norm"),
    tensor(HF_LAYER + "self_attn.q_proj.weight", LOGICAL + "attention.query.weight", when=_whole_queries),
    *(replace(rule, when=_low_rank_queries) for rule in _QUERY_LATENT),
    tensor(HF_LAYER + "self_attn.kv_a_proj_with_mqa.weight", LOGICAL + "attention.key_value_down.weight"),
    *norm(HF_LAYER + "self_attn.kv_a_layernorm", LOGICAL + "attention.key_value_norm"),
    tensor(HF_LAYER + "self_attn.kv_b_proj.weight", LOGICAL + "attention.key_value_up.weight"),
    tensor(HF_LAYER + "self_attn.o_proj.weight", LOGICAL + "attention.output.weight"),
    *norm(HF_LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm"),
)
"""Row for row what Megatron stores: both rotate neighbouring elements (rope_utils.py, `_apply_rotary_pos_emb_bshd`;
modeling_deepseek_v3.py, `apply_rotary_pos_emb_interleave`)."""


def _gated_mlp(target: str, logical: str) -> tuple[TargetRule, ...]:
    return tuple(
        tensor(f"{HF_LAYER}mlp.{target}{part}_proj.weight", f"{LOGICAL}{logical}.{part}.weight")
        for part in ("gate", "up", "down")
    )


EXPERT_RULES = tuple(
    replace(rule, layers=_experts)
    for rule in (
        tensor(HF_LAYER + "mlp.gate.weight", LOGICAL + "router.weight"),
        *_gated_mlp("experts.{expert}.", "experts.{expert}"),
        *_gated_mlp("shared_experts.", "shared_expert"),
    )
)
DENSE_RULES = tuple(replace(rule, layers=_dense) for rule in _gated_mlp("", "mlp"))

_ROUTER_BIAS = TargetRule(
    HF_LAYER + "mlp.gate.e_score_correction_bias",
    (Input(LOGICAL + "router.expert_bias", zeros_for=LOGICAL + "router.weight"),),
    dtype="float32",
    layers=_experts,
)
_DECODER_RULES = (*LATENT_ATTENTION_RULES, *EXPERT_RULES, _ROUTER_BIAS)

ENDS_RULES = (*ENDS, *norm("model.norm", "final_norm", scope=Scope.LAST))


def _mtp(rule: TargetRule) -> TargetRule:
    """The same tensor of a layer that predicts a further token."""
    inputs = tuple(
        replace(
            part,
            logical=part.logical.replace("layers.", "mtp.", 1),
            zeros_for=part.zeros_for and part.zeros_for.replace("layers.", "mtp.", 1),
        )
        for part in rule.inputs
    )
    return replace(rule, inputs=inputs, scope=Scope.MTP)


MTP_RULES = (
    tensor(HF_LAYER + "embed_tokens.weight", "embedding.weight", scope=Scope.MTP),
    *norm(HF_LAYER + "enorm", "mtp.{layer}.embedding_norm", scope=Scope.MTP),
    *norm(HF_LAYER + "hnorm", "mtp.{layer}.hidden_norm", scope=Scope.MTP),
    tensor(HF_LAYER + "eh_proj.weight", "mtp.{layer}.projection.weight", scope=Scope.MTP),
    *norm(HF_LAYER + "shared_head.norm", "mtp.{layer}.final_norm", scope=Scope.MTP),
    tensor(HF_LAYER + "shared_head.head.weight", "head.weight", scope=Scope.MTP),
    *(_mtp(rule) for rule in _DECODER_RULES),
)
"""As the published checkpoints have them, with copies of the embedding and the head (DeepSeek-V3,
README_WEIGHTS.md): consumers that predict with these layers look for them there."""

TABLE = (*ENDS_RULES, *_DECODER_RULES, *DENSE_RULES, *MTP_RULES)


def first_k_dense(model: ModelConfig) -> int:
    """Dense layers before the first with experts."""
    return next((layer for layer in range(model.num_layers) if model.has_experts(layer)), model.num_layers)


def rope_scaling(model: ModelConfig) -> dict[str, object] | None:
    """Yarn with the numbers that transformers (modeling_rope_utils.py) and DeepSeek's own code read."""
    scaling = model.rope_scaling
    if scaling is None:
        return None
    numbers = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return {
        "type": "yarn",
        "rope_type": "yarn",
        **{name: getattr(scaling, name) for name in numbers},
    }


def common_fields(model: ModelConfig) -> dict[str, object]:
    """Fields of DeepseekV2Config and DeepseekV3Config alike."""
    fields = hf.decoder_fields(model)
    for name in ("head_dim", "mlp_bias"):
        del fields[name]
    return {
        **fields,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "n_shared_experts": model.moe_shared_expert_ffn_hidden_size // max(model.moe_ffn_hidden_size, 1),
        "n_routed_experts": model.num_experts,
        "routed_scaling_factor": model.moe_router_scaling_factor or 1.0,
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": model.q_lora_rank or None,
        "qk_rope_head_dim": model.qk_rope_head_size,
        "qk_nope_head_dim": model.qk_nope_head_size,
        "v_head_dim": model.value_head_size,
        "num_experts_per_tok": model.moe_top_k,
        "first_k_dense_replace": first_k_dense(model),
        "moe_layer_freq": 1,
        "n_group": model.moe_router_num_groups or 1,
        "topk_group": model.moe_router_group_top_k or 1,
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": rope_scaling(model),
        "ep_size": 1,
    }


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """DeepseekV3Config (transformers/models/deepseek_v3/configuration_deepseek_v3.py), and what vLLM's and SGLang's
    models read besides."""
    return {
        "model_type": "deepseek_v3",
        **common_fields(model),
        "norm_topk_prob": model.moe_top_k > 1,  # moe_utils.py, `topk_routing_with_score_function`
        "rope_interleave": True,
        "num_nextn_predict_layers": model.num_mtp_layers,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def whole_shared_experts(model: ModelConfig) -> bool:
    """Shared experts are counted in routed ones' sizes."""
    return model.moe_shared_expert_ffn_hidden_size % max(model.moe_ffn_hidden_size, 1) == 0


def _dense_layers_first(model: ModelConfig) -> bool:
    return all(model.has_experts(layer) for layer in range(first_k_dense(model), model.num_layers))


def yarn_or_none(model: ModelConfig) -> bool:
    """The only rotary scaling of the family."""
    scaling = model.rope_scaling
    return scaling is None or (scaling.kind == "yarn" and scaling.truncate)


def _mscale_of_all_dims(model: ModelConfig) -> bool:
    """transformers forgets mscale where mscale_all_dim is 0, which makes no difference for 1."""
    scaling = model.rope_scaling
    return scaling is None or scaling.mscale == 1.0 or scaling.mscale_all_dim != 0


COMMON_LIMITS: tuple[Limit, ...] = (
    (lambda m: m.qk_norm, "its attention latents are normalised"),
    (lambda m: not m.zero_centered_norm or m.normalization == "RMSNorm", "it has RMSNorm only"),
    (lambda m: not m.rotary_interleaved and m.rotary_percent == 1.0, "its rotary embeddings are whole"),
    (lambda m: m.window_size is None, "it has no attention window"),
    (lambda m: not m.linear_bias and not m.qkv_bias, "it has no biases"),
    (lambda m: m.moe_shared_expert_ffn_hidden_size > 0, "it has shared experts"),
    (whole_shared_experts, "its shared experts are as large as whole routed ones"),
    (lambda m: not m.moe_shared_expert_gate, "its shared experts have no gate"),
    (_dense_layers_first, "its dense layers come before those with experts"),
    (yarn_or_none, "its rotary scaling is yarn with whole borders, or none"),
    (_mscale_of_all_dims, "its yarn has mscale 1 where mscale_all_dim is 0"),
)

HF_LIMITS: tuple[Limit, ...] = (
    *COMMON_LIMITS,
    (lambda m: m.moe_router_score_function == "sigmoid", "its router scores by sigmoid"),
    (
        # transformers and vLLM rank groups by their two best experts; Megatron by as many as a token takes of a group.
        lambda m: m.moe_router_group_top_k is None or m.moe_top_k // m.moe_router_group_top_k == 2,
        "its router picks groups of experts by their two best: top-k must be twice the groups per token",
    ),
)


def hf_notes(model: ModelConfig) -> tuple[str, ...]:
    """Where transformers computes something else than DeepSeek's own code, vLLM and SGLang do."""
    if model.norm_epsilon == 1e-6:
        return ()
    return (
        f"the model normalises its attention latents with epsilon {model.norm_epsilon:g}; transformers computes them "
        "with 1e-6 whatever rms_norm_eps says, vLLM and SGLang by rms_norm_eps",
    )


def unmet_base(config: ModelConfig) -> list[str]:
    """Why a model is not on the DeepSeek base, V2 or V3."""
    wanted = (
        (config.kv_lora_rank > 0, "it has ordinary attention"),
        (config.num_experts > 0, "it has no experts"),
        (config.normalization == "RMSNorm", f"normalization is {config.normalization}, not RMSNorm"),
        (config.gated and config.activation == "silu", f"the experts are not gated SiLU ones ({config.activation})"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
    )
    return [reason for holds, reason in wanted if not holds]


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not DeepSeek-V3-style."""
    score = config.moe_router_score_function
    return unmet_base(config) + ([] if score == "sigmoid" else [f"the router scores by {score}"])


NO_ENGINE = {
    "trtllm": "its DeepseekV2ForCausalLM (0.15 to 0.18) scores experts by softmax and has no bias for choosing among "
    "them, and no release up to 1.2 has another class for it"
}
"""tensorrt_llm/layers/moe.py, ``MoeConfig.ExpertScaleNormalizationMode`` and ``group_limited_greedy``. There and later
models/deepseek_v2/config.py raises for ``topk_method`` noaux_tc, and MODEL_MAP has no DeepseekV3ForCausalLM."""

DEEPSEEK_V3 = Family(
    name="deepseek-v3",
    description="multi-latent attention, sigmoid router with expert bias, shared experts, MTP: DeepSeek-V3, Moonlight",
    unmet=unmet,
    source_rules=SOURCES,
    architectures={
        "hf": (
            HuggingFaceModel(
                name="DeepseekV3ForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS, notes=hf_notes
            ),
        ),
    },
    unserved=NO_ENGINE,
    witnesses={"hf": "transformers"},
    features=frozenset({LATENT_ATTENTION, MTP, YARN}),
)
