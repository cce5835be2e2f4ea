"""Llama-style models: RMSNorm, rotary positions, a gated SiLU MLP. Llama 2 and 3.x and their kin."""

from __future__ import annotations

from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT, any_bias, linear_bias
from dist_export.models.rules import Family, Scope, TargetRule
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm.architecture import EngineModel, Limit
from dist_export.targets.trtllm.releases import COMMON_KEYS, Keys
from dist_export.targets.trtllm.tables import (
    COLUMN_PARALLEL,
    ROW_PARALLEL,
    EmbeddingSharding,
    decoder_layer,
    ends,
    linear,
)


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Llama-style."""
    wanted = (
        (config.normalization == "RMSNorm", f"normalization is {config.normalization}, not RMSNorm"),
        (config.gated and config.activation == "silu", f"the MLP is not a gated SiLU one ({config.activation})"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
        (config.num_experts == 0, f"it has {config.num_experts} experts"),
    )
    return [reason for holds, reason in wanted if not holds]


def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """LlamaForCausalLM, dense: RMSNorm and a gated MLP where ``fc`` is the activated half.

    With attn_bias the class wants both qkv.bias and dense.bias; with mlp_bias all three of the MLP
    (tensorrt_llm/models/llama/model.py).
    """
    return (
        *ends(embedding),
        *decoder_layer(),
        *linear("attention.dense", "attention.output", ROW_PARALLEL, bias=any_bias),
        *linear("mlp.fc", "mlp.gate", COLUMN_PARALLEL, bias=linear_bias),
        *linear("mlp.gate", "mlp.up", COLUMN_PARALLEL, bias=linear_bias),
        *linear("mlp.proj", "mlp.down", ROW_PARALLEL, bias=linear_bias),
    )


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """LLaMAConfig: a dense MLP is gated already, so the activation is the plain one inside it."""
    return {
        "hidden_act": trtllm.PLAIN_ACTIVATIONS[model.activation],
        "mlp_bias": model.linear_bias,
        "attn_bias": any_bias(model),
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "remove_duplicated_kv_heads": False,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
    }


ENGINE_LIMITS: tuple[Limit, ...] = (
    *trtllm.ANY_CLASS,
    (lambda m: m.normalization == "RMSNorm", "the class has RMSNorm only, the model has LayerNorm"),
    (lambda m: m.gated, "the class has a gated MLP only"),
    (lambda m: m.position_embedding == "rope", "the class has rotary positions only"),
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not passed to its attention"),
    (lambda m: not m.rotary_interleaved, "interleaved rotary embeddings are not passed to its attention"),
)
"""Limits of the class with and without experts."""

KEYS = Keys(
    (*COMMON_KEYS, "mlp_bias", "attn_bias"),
    ("residual_mlp", "disable_weight_only_quant_plugin", "remove_duplicated_kv_heads", "share_embedding_table"),
)

ENGINE = EngineModel(
    name="LlamaForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=(*ENGINE_LIMITS, trtllm.DENSE),
    keys=KEYS,
)

TABLE = (
    *hf_tables.ENDS,
    *hf_tables.norm(hf_tables.LAYER + "input_layernorm", hf_tables.LOGICAL + "attention.norm"),
    *hf_tables.ATTENTION,
    *hf_tables.norm(hf_tables.LAYER + "post_attention_layernorm", hf_tables.LOGICAL + "mlp.norm"),
    *hf_tables.linear(hf_tables.LAYER + "mlp.gate_proj", hf_tables.LOGICAL + "mlp.gate", bias=linear_bias),
    *hf_tables.linear(hf_tables.LAYER + "mlp.up_proj", hf_tables.LOGICAL + "mlp.up", bias=linear_bias),
    *hf_tables.linear(hf_tables.LAYER + "mlp.down_proj", hf_tables.LOGICAL + "mlp.down", bias=linear_bias),
    *hf_tables.norm("model.norm", "final_norm", scope=Scope.LAST),
)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """LlamaConfig (transformers/models/llama/configuration_llama.py)."""
    return {
        "model_type": "llama",
        **hf.decoder_fields(model),
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": hf.rope_scaling(model),
    }


HF_LAYER_LIMITS = (
    (lambda m: m.normalization == "RMSNorm", "it has RMSNorm only"),
    (lambda m: m.gated, "it has a gated MLP only"),
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not expressible"),
)

HF_LIMITS = (*hf.ROPE, *HF_LAYER_LIMITS)

LLAMA = Family(
    name="llama",
    description="RMSNorm, rope, SwiGLU: Llama 2/3.x",
    unmet=unmet,
    source_rules=DENSE_GPT,
    architectures={
        "trtllm": (ENGINE,),
        "hf": (
            HuggingFaceModel(name="LlamaForCausalLM", rules=TABLE, fields=hf_fields, limits=(*HF_LIMITS, hf.DENSE)),
        ),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
