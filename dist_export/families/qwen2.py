"""Qwen2-style models: the Llama base with biases on query, key and value alone. Qwen1.5, Qwen2 and Qwen2.5."""

from __future__ import annotations

from dist_export.families import llama
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT, linear_bias, qkv_bias
from dist_export.models.rules import Condition, Family, Scope, TargetRule
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.huggingface.tables import LAYER as HF_LAYER
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm.architecture import EngineModel, Limit
from dist_export.targets.trtllm.releases import COMMON_KEYS, Keys
from dist_export.targets.trtllm.tables import (
    COLUMN_PARALLEL,
    LOGICAL,
    ROW_PARALLEL,
    EmbeddingSharding,
    decoder_layer,
    ends,
    linear,
)

SEQUENCE_LENGTH = 8192
"""The class reads it from 0.16 on, and uses it only for logn scaling, which these models do not have."""


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Qwen2-style."""
    wanted = (
        (config.qkv_bias, "query, key and value have no bias"),
        (not config.linear_bias, "linear layers other than query, key and value have biases"),
        (not config.qk_norm, "it has q/k norm"),
    )
    return llama.unmet(config) + [reason for holds, reason in wanted if not holds]


def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """QWenForCausalLM, dense: of attention only qkv has a bias (tensorrt_llm/models/qwen/model.py, ``dense_bias``)."""
    return (
        *ends(embedding),
        *decoder_layer(),
        *linear("attention.dense", "attention.output", ROW_PARALLEL, bias=linear_bias),
        *linear("mlp.fc", "mlp.gate", COLUMN_PARALLEL, bias=linear_bias),
        *linear("mlp.gate", "mlp.up", COLUMN_PARALLEL, bias=linear_bias),
        *linear("mlp.proj", "mlp.down", ROW_PARALLEL, bias=linear_bias),
    )


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """QWenConfig. The class reads ``qwen_type`` and the expert sizes whatever the model is."""
    return {
        "hidden_act": trtllm.PLAIN_ACTIVATIONS[model.activation],
        "mlp_bias": False,
        "attn_bias": model.qkv_bias,
        "disable_weight_only_quant_plugin": False,
        "qwen_type": "qwen2",
        "seq_length": SEQUENCE_LENGTH,
        "use_logn_attn": False,
        "moe_intermediate_size": 0,
        "moe_shared_expert_intermediate_size": 0,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 0},
    }


BASE_LIMITS: tuple[Limit, ...] = (
    *trtllm.REPRESENTABLE,
    (lambda m: m.normalization == "RMSNorm", "the class has RMSNorm only, the model has LayerNorm"),
    (lambda m: m.gated and m.activation == "silu", "the class has a gated SiLU MLP only"),
    (lambda m: m.position_embedding == "rope", "the class has rotary positions only"),
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not passed to its attention"),
    (lambda m: not m.rotary_interleaved, "interleaved rotary embeddings are not expressible"),
    (lambda m: not m.linear_bias, "linear layers other than query, key and value have no bias in the class"),
)
"""Limits of the class whatever its ``qwen_type``."""

KEYS = Keys(
    (
        *(*COMMON_KEYS, "mlp_bias", "attn_bias", "qwen_type", "seq_length"),
        *("moe_intermediate_size", "moe_shared_expert_intermediate_size"),
    ),
    ("disable_weight_only_quant_plugin", "use_logn_attn", "share_embedding_table"),
)

ENGINE = EngineModel(
    name="Qwen2ForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=(*BASE_LIMITS, trtllm.NO_QK_NORM, trtllm.DENSE),
    keys=KEYS,
)


def attention(bias: Condition) -> tuple[TargetRule, ...]:
    """Projections of which only query, key and value may have a bias."""
    return (
        *hf_tables.linear(HF_LAYER + "self_attn.q_proj", LOGICAL + "attention.query", bias=bias),
        *hf_tables.linear(HF_LAYER + "self_attn.k_proj", LOGICAL + "attention.key", bias=bias),
        *hf_tables.linear(HF_LAYER + "self_attn.v_proj", LOGICAL + "attention.value", bias=bias),
        hf_tables.tensor(HF_LAYER + "self_attn.o_proj.weight", LOGICAL + "attention.output.weight"),
    )


NORMS = (
    *hf_tables.norm(HF_LAYER + "input_layernorm", LOGICAL + "attention.norm"),
    *hf_tables.norm(HF_LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm"),
    *hf_tables.norm("model.norm", "final_norm", scope=Scope.LAST),
)

MLP = (
    hf_tables.tensor(HF_LAYER + "mlp.gate_proj.weight", LOGICAL + "mlp.gate.weight"),
    hf_tables.tensor(HF_LAYER + "mlp.up_proj.weight", LOGICAL + "mlp.up.weight"),
    hf_tables.tensor(HF_LAYER + "mlp.down_proj.weight", LOGICAL + "mlp.down.weight"),
)

TABLE = (*hf_tables.ENDS, *NORMS, *attention(qkv_bias), *MLP)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """Qwen2Config (transformers/models/qwen2/configuration_qwen2.py). Biases are not optional there."""
    fields = hf.decoder_fields(model)
    for name in ("attention_bias", "mlp_bias"):
        del fields[name]
    return {
        **fields,
        "model_type": "qwen2",
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": hf.rope_scaling(model),
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": model.num_layers,
    }


HF_BASE_LIMITS: tuple[Limit, ...] = (
    (lambda m: m.normalization == "RMSNorm", "it has RMSNorm only"),
    (lambda m: m.gated, "it has a gated MLP only"),
    (lambda m: not m.linear_bias, "linear layers other than query, key and value have no bias"),
    (lambda m: m.position_embedding == "rope", "it has rotary positions only"),
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not expressible"),
    (lambda m: not m.rotary_interleaved, "interleaved rotary embeddings are not expressible"),
    (lambda m: m.rope_scaling is None or m.rope_scaling.kind != "yarn", "yarn rotary scaling is not expressible"),
    (lambda m: m.window_size is None, "its consumers disagree about which layers max_window_layers gives a window to"),
)

HF_LIMITS: tuple[Limit, ...] = (
    *HF_BASE_LIMITS,
    (lambda m: m.qkv_bias, "query, key and value have biases there"),
    (lambda m: not m.qk_norm, "it has no q/k norm"),
    hf.DENSE,
)

QWEN2 = Family(
    name="qwen2",
    description="the Llama base with biases on query, key and value: Qwen1.5, Qwen2, Qwen2.5",
    unmet=unmet,
    source_rules=DENSE_GPT,
    architectures={
        "trtllm": (ENGINE,),
        "hf": (HuggingFaceModel(name="Qwen2ForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
