"""DeepSeek-V2 and V2-Lite: the DeepSeek-V3 base with a router that scores by softmax and has no expert bias."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from dist_export.errors import ExportError
from dist_export.families import deepseek_v3
from dist_export.models.config import ModelConfig
from dist_export.models.features import LATENT_ATTENTION, YARN
from dist_export.models.layout_ops import SPLIT_KEY_VALUE_UP
from dist_export.models.megatron import LAYER as MEGATRON_LAYER
from dist_export.models.rules import Condition, Family, Input, LayerCondition, SourceRule, TargetRule
from dist_export.models.shard_ops import COLUMN, HEADS, ROW
from dist_export.plan.layout import TargetLayout
from dist_export.targets.huggingface.architecture import HuggingFaceModel, Limit
from dist_export.targets.trtllm.architecture import EngineModel, ReleaseLimit
from dist_export.targets.trtllm.releases import ALL, COMMON_KEYS, Keys, Span
from dist_export.targets.trtllm.tables import LAYER, LOGICAL, EmbeddingSharding, ends, norm


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not DeepSeek-V2-style."""
    score = config.moe_router_score_function
    return deepseek_v3.unmet_base(config) + ([] if score == "softmax" else [f"the router scores by {score}"])


TABLE = (
    *deepseek_v3.ENDS_RULES,
    *deepseek_v3.LATENT_ATTENTION_RULES,
    *deepseek_v3.EXPERT_RULES,
    *deepseek_v3.DENSE_RULES,
)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """DeepseekV2Config (transformers/models/deepseek_v2/configuration_deepseek_v2.py)."""
    return {
        "model_type": "deepseek_v2",
        **deepseek_v3.common_fields(model),
        "mlp_bias": False,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy" if model.moe_router_group_top_k is None else "group_limited_greedy",
    }


HF_LIMITS: tuple[Limit, ...] = (
    *deepseek_v3.COMMON_LIMITS,
    (lambda m: m.moe_router_pre_softmax, "its router takes the softmax over all experts"),
    (lambda m: not m.moe_router_expert_bias, "its router has no expert bias"),
    (
        # transformers and vLLM rank groups by their best expert; Megatron by as many as a token takes of a group.
        lambda m: m.moe_router_group_top_k is None or m.moe_top_k // m.moe_router_group_top_k == 1,
        "its router picks groups of experts by their best: top-k must be below twice the groups per token",
    ),
)


def hf_notes(model: ModelConfig) -> tuple[str, ...]:
    """Where transformers computes something else than DeepSeek's own code, vLLM and SGLang do."""
    scaling = model.rope_scaling
    if scaling is None or not scaling.mscale_all_dim:
        return deepseek_v3.hf_notes(model)
    return (
        *deepseek_v3.hf_notes(model),
        "scores are scaled by yarn's mscale_all_dim; transformers' own DeepSeek-V2 leaves that out, DeepSeek's code "
        "and vLLM compute it",
    )


# --- TensorRT-LLM -----------------------------------------------------------------------------------------------------

KEYS_AND_VALUES = SourceRule(
    MEGATRON_LAYER + "self_attention.linear_kv_up_proj.weight",
    ("layers.{layer}.attention.key_up.weight", "layers.{layer}.attention.value_up.weight"),
    SPLIT_KEY_VALUE_UP,
)
"""Apart, as the engine's attention has them."""

_ATTENTION, _PARTS = LAYER + "attention.", LOGICAL + "attention."


def _low_rank_queries(config: ModelConfig) -> bool:
    return config.q_lora_rank > 0


def _whole_queries(config: ModelConfig) -> bool:
    return not config.q_lora_rank


def _dense(config: ModelConfig, layer: int) -> bool:
    return not config.has_experts(layer)


def _experts(config: ModelConfig, layer: int) -> bool:
    return config.has_experts(layer)


def _queries(name: str, when: Condition) -> tuple[TargetRule, ...]:
    """What is made of the queries' (up-)projection: parameters of the attention itself, without ``.weight``."""
    queries = Input(f"{_PARTS}{name}.weight", HEADS)
    keys = Input(_PARTS + "key_up.weight", HEADS)
    return (
        TargetRule(_ATTENTION + "q_b_proj", (queries,), when=when),
        TargetRule(_ATTENTION + "fused_q_proj", (queries, keys), absorbed=True, when=when),
    )


_QUERY_DOWN, _KEY_VALUE_DOWN = Input(_PARTS + "query_down.weight"), Input(_PARTS + "key_value_down.weight")

ENGINE_ATTENTION = (
    TargetRule(_ATTENTION + "fused_a.weight", (_QUERY_DOWN, _KEY_VALUE_DOWN), when=_low_rank_queries),
    TargetRule(_ATTENTION + "fused_a.weight", (_KEY_VALUE_DOWN,), when=_whole_queries),
    *(replace(each, when=_low_rank_queries) for each in norm(_ATTENTION + "q_a_layernorm", _PARTS + "query_norm")[:1]),
    *norm(_ATTENTION + "kv_a_layernorm", _PARTS + "key_value_norm"),
    *_queries("query_up", _low_rank_queries),
    *_queries("query", _whole_queries),
    TargetRule(
        _ATTENTION + "kv_b_proj",
        (Input(_PARTS + "key_up.weight", HEADS), Input(_PARTS + "value_up.weight", HEADS)),
    ),
    TargetRule(_ATTENTION + "dense.weight", (Input(_PARTS + "output.weight", ROW),)),
)
"""tensorrt_llm/layers/attention.py, ``DeepseekV2Attention``. Down-projections and norms are whole on every rank. All
keys of a rank's heads come before their values."""


def _linear(target: str, logical: str, *, layers: LayerCondition) -> TargetRule:
    shard = ROW if logical.endswith("down") else COLUMN
    return TargetRule(f"{LAYER}mlp.{target}.weight", (Input(f"{LOGICAL}{logical}.weight", shard),), layers=layers)


def _engine_experts(prefix: str) -> tuple[TargetRule, ...]:
    """Stacked experts, the linear half first, and the float32 router (tensorrt_llm/layers/moe.py)."""
    expert = LOGICAL + "experts.{expert}."
    up, gate = Input(expert + "up.weight", COLUMN), Input(expert + "gate.weight", COLUMN)
    return (
        TargetRule(prefix + "router.weight", (Input(LOGICAL + "router.weight"),), dtype="float32", layers=_experts),
        TargetRule(prefix + "fc.weight", (up, gate), layers=_experts),
        TargetRule(prefix + "proj.weight", (Input(expert + "down.weight", ROW),), layers=_experts),
    )


_SHARED = LOGICAL + "shared_expert."
EXPERTS_0_15 = (
    *_engine_experts(LAYER + "mlp.moe."),
    _linear("shared_experts.fc", "shared_expert.gate", layers=_experts),
    _linear("shared_experts.gate", "shared_expert.up", layers=_experts),
    _linear("shared_experts.proj", "shared_expert.down", layers=_experts),
)
"""``SharedMoE`` there: experts and a gated MLP, each a module."""
EXPERTS_0_16 = (
    *_engine_experts(LAYER + "mlp."),
    TargetRule(
        LAYER + "mlp.shared_expert.fc.weight",
        (Input(_SHARED + "up.weight", COLUMN), Input(_SHARED + "gate.weight", COLUMN)),
        layers=_experts,
    ),
    _linear("shared_expert.proj", "shared_expert.down", layers=_experts),
)
"""``SharedMoE`` there: experts with a fused MLP among them."""

ENGINE_DENSE = (
    _linear("fc", "mlp.gate", layers=_dense),
    _linear("gate", "mlp.up", layers=_dense),
    _linear("proj", "mlp.down", layers=_dense),
)


def engine_rules(experts: tuple[TargetRule, ...]) -> Callable[[EmbeddingSharding], tuple[TargetRule, ...]]:
    """DeepseekV2ForCausalLM of a release (tensorrt_llm/models/deepseek_v2/model.py)."""

    def rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
        if embedding.dim:
            raise ExportError(
                "DeepSeek-V2 in TensorRT-LLM has the whole embedding on every rank: leave out --embedding-sharding-dim"
            )
        return (
            *ends(EmbeddingSharding(parallel=False)),
            *norm(LAYER + "input_layernorm", LOGICAL + "attention.norm"),
            *ENGINE_ATTENTION,
            *norm(LAYER + "post_layernorm", LOGICAL + "mlp.norm"),
            *ENGINE_DENSE,
            *experts,
        )

    return rules


def engine_rope_scaling(model: ModelConfig) -> dict[str, object]:
    """The class reads yarn's numbers of every model; a factor of one changes nothing."""
    scaling = model.rope_scaling
    names = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings")
    plain = dict(zip(names, (1.0, 32.0, 1.0, 1.0, 0.0, model.max_position_embeddings), strict=True))
    return {"type": "yarn", **(plain if scaling is None else {name: getattr(scaling, name) for name in names})}


def renorm_mode(model: ModelConfig) -> int:
    """``MoeConfig.ExpertScaleNormalizationMode``: DEVICE_LIMITED picks among the best groups, RENORMALIZE takes the
    softmax over the chosen experts, NONE over all."""
    if model.moe_router_group_top_k is not None:
        return 3
    return 0 if model.moe_router_pre_softmax else 1


def fields_0_15(model: ModelConfig) -> dict[str, object]:
    """What the class and its converter's ``create_trt_config_from_hf`` name; ``head_size`` is the loader's default."""
    return {
        "hidden_act": "swiglu",
        "head_size": model.hidden_size // model.num_attention_heads,
        "qk_layernorm": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "rotary_scaling": engine_rope_scaling(model),
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": model.q_lora_rank or None,
        "qk_nope_head_dim": model.qk_nope_head_size,
        "qk_rope_head_dim": model.qk_rope_head_size,
        "v_head_dim": model.value_head_size,
        "moe_num_experts": model.num_experts,
        "moe_inter_size": model.moe_ffn_hidden_size,
        "moe_num_shared_experts": model.moe_shared_expert_ffn_hidden_size // max(model.moe_ffn_hidden_size, 1),
        "moe_top_k": model.moe_top_k,
        "moe_renorm_mode": renorm_mode(model),
        "moe_n_group": model.moe_router_num_groups or 1,
        "moe_topk_group": model.moe_router_group_top_k or 1,
        "moe_routed_scaling_factor": model.moe_router_scaling_factor or 1.0,
    }


def fields_0_16(model: ModelConfig) -> dict[str, object]:
    """The same, and the table that ``DeepSeekV2Config`` reads instead in 0.18, if not before."""
    fields = fields_0_15(model)
    experts = {
        "num_experts": model.num_experts,
        "shared_expert_intermediate_size": model.moe_shared_expert_ffn_hidden_size,
        "top_k": model.moe_top_k,
        "normalization_mode": fields["moe_renorm_mode"],
        "device_limited_n_group": fields["moe_n_group"],
        "device_limited_topk_group": fields["moe_topk_group"],
        "device_limited_routed_scaling_factor": fields["moe_routed_scaling_factor"],
    }
    return {**fields, "moe": experts}


def _one_dense_layer(model: ModelConfig) -> bool:
    return [model.has_experts(layer) for layer in range(model.num_layers)] == [False] + [True] * (model.num_layers - 1)


def _groups(model: ModelConfig) -> bool:
    return model.moe_router_group_top_k is not None


ENGINE_LIMITS: tuple[Limit, ...] = (
    (lambda m: m.qk_norm, "the class norms its attention latents"),
    (lambda m: not m.rotary_interleaved and m.rotary_percent == 1.0, "the class's rotary embeddings are whole"),
    (lambda m: m.window_size is None, "the class has no attention window"),
    (lambda m: not m.linear_bias and not m.qkv_bias, "the class has no biases"),
    (
        lambda m: m.value_head_size == m.qk_nope_head_size,
        "the class's values are as large as the unrotated part of its keys",
    ),
    (deepseek_v3.yarn_or_none, "the class's rotary scaling is yarn with whole borders"),
    (_one_dense_layer, "the class has a dense first layer and experts in all others"),
    (lambda m: m.moe_shared_expert_ffn_hidden_size > 0, "the class has shared experts"),
    (deepseek_v3.whole_shared_experts, "the class's shared experts are as large as whole routed ones"),
    (lambda m: not m.moe_shared_expert_gate, "the class's shared experts have no gate"),
    (lambda m: not m.moe_router_expert_bias, "the class's router has no expert bias"),
    (
        lambda m: not _groups(m) or m.moe_top_k // (m.moe_router_group_top_k or 1) == 1,
        "the class picks groups of experts by their best: top-k must be below twice the groups per token",
    ),
    (
        lambda m: not _groups(m) or m.moe_router_pre_softmax,
        "the class takes the softmax over all experts where it picks groups",
    ),
    (
        lambda m: _groups(m) or m.moe_router_scaling_factor in (None, 1.0),
        "the class scales its experts' weights only where it picks groups",
    ),
)


def _dense_divides(model: ModelConfig, layout: TargetLayout) -> bool:
    return model.ffn_hidden_size % layout.tp_size == 0


def _shared_divides(model: ModelConfig, layout: TargetLayout) -> bool:
    return model.moe_shared_expert_ffn_hidden_size % layout.tp_size == 0


def engine_notes(model: ModelConfig) -> list[str]:
    """What the class keeps of the products, and what they depend on."""
    return [
        "attention.fused_q_proj holds products of query and key projections, rounded to the element type as the "
        "class's converter does, by torch on this machine's CPU; another CPU may round single elements the other way"
    ]


KEYS = Keys(
    (
        *(key for key in COMMON_KEYS if key != "moe"),
        *(
            *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_num_experts"),
            *(
                "moe_inter_size",
                "moe_num_shared_experts",
                "moe_top_k",
                "moe_renorm_mode",
                "moe_n_group",
                "moe_topk_group",
            ),
            "moe_routed_scaling_factor",
        ),
    ),
    ("share_embedding_table", "moe"),
)


def engine(
    releases: Span,
    experts: tuple[TargetRule, ...],
    fields: Callable[[ModelConfig], dict[str, object]],
    *limits: ReleaseLimit,
) -> EngineModel:
    """The class of some releases."""
    divide = (
        ReleaseLimit(ALL, _dense_divides, "the dense layer does not divide by tp"),
        ReleaseLimit(ALL, _shared_divides, "the shared experts do not divide by tp"),
    )
    return EngineModel(
        name="DeepseekV2ForCausalLM",
        rules=engine_rules(experts),
        fields=fields,
        limits=ENGINE_LIMITS,
        keys=KEYS,
        releases=releases,
        release_limits=(*limits, *divide),
        dtypes=("bfloat16", "float16"),  # the converter makes float16 of float32
        notes=engine_notes,
    )


ENGINES = (
    engine(
        Span("0.15", "0.15"),
        EXPERTS_0_15,
        fields_0_15,
        ReleaseLimit(
            Span("0.15", "0.15"),
            lambda model, layout: model.q_lora_rank > 0,
            "queries without a latent (V2-Lite) came with 0.16",
        ),
    ),
    engine(Span("0.16", "0.18"), EXPERTS_0_16, fields_0_16),
)
"""From 0.19 on the class is there but no engine can be built of it: its attention declares ``k_b_proj_trans`` and
passes ``fused_q_proj``, which it has not, to a plugin that does not take it (tensorrt_llm/layers/attention.py,
``DeepseekV2Attention.forward``; tensorrt_llm/functional.py, ``gpt_attention``)."""

DEEPSEEK_V2 = Family(
    name="deepseek-v2",
    description="multi-latent attention, softmax router, shared experts: DeepSeek-V2 and V2-Lite",
    unmet=unmet,
    source_rules=(*(rule for rule in deepseek_v3.SOURCES if not rule.source.startswith("mtp.")), KEYS_AND_VALUES),
    architectures={
        "trtllm": ENGINES,
        "hf": (
            HuggingFaceModel(
                name="DeepseekV2ForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS, notes=hf_notes
            ),
        ),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.15's and 0.16's converters", "hf": "transformers"},
    features=frozenset({LATENT_ATTENTION, YARN}),
)
