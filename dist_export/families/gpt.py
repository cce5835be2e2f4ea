"""GPT-style models: LayerNorm, learned or rotary positions, a plain or gated MLP, biases or none."""

from __future__ import annotations

from functools import partial

from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT, any_bias, gated, not_gated, untied
from dist_export.models.rules import Family, Input, Scope, TargetRule
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.huggingface.tables import LOGICAL, norm, tensor
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm.architecture import EngineModel
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
    """Why a model is not GPT-style."""
    wanted = (
        (config.normalization == "LayerNorm", f"normalization is {config.normalization}, not LayerNorm"),
        (config.num_experts == 0, f"it has {config.num_experts} experts"),
    )
    return [reason for holds, reason in wanted if not holds]


def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """GPTForCausalLM: LayerNorm, plain or gated MLP (tensorrt_llm/models/gpt/model.py)."""
    return (
        *ends(embedding),
        *decoder_layer(),
        *linear("attention.dense", "attention.output", ROW_PARALLEL, bias=any_bias),
        *linear("mlp.fc", "mlp.up", COLUMN_PARALLEL, bias=any_bias, when=not_gated),
        *linear("mlp.fc", "mlp.gate", COLUMN_PARALLEL, bias=any_bias, when=gated),
        *linear("mlp.gate", "mlp.up", COLUMN_PARALLEL, bias=any_bias, when=gated),
        *linear("mlp.proj", "mlp.down", ROW_PARALLEL, bias=any_bias),
    )


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """GPTConfig: the activation keeps its gated name, which is what makes the MLP a gated one."""
    return {
        "gpt_variant": "gpt2",
        "hidden_act": (trtllm.GATED_ACTIVATIONS if model.gated else trtllm.PLAIN_ACTIVATIONS)[model.activation],
        "bias": any_bias(model),
        "q_scaling": 1.0,
        "embedding_scale": None,
        "apply_query_key_layer_scaling": False,  # Megatron divides and multiplies back: no net effect
        "rotary_pct": model.rotary_percent,
        "inner_layernorm": False,
        "norm_before_bmm1": False,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 1},
    }


ENGINE = EngineModel(
    name="GPTForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=(
        *trtllm.ANY_CLASS,
        trtllm.DENSE,
        (lambda m: m.normalization == "LayerNorm", "the class has LayerNorm only, the model has RMSNorm"),
        (lambda m: not m.gated or m.activation in trtllm.GATED_ACTIVATIONS, "only swiglu and geglu are gated there"),
    ),
    keys=Keys(
        (*COMMON_KEYS, "bias", "rotary_pct", "q_scaling", "apply_query_key_layer_scaling"),
        ("gpt_variant", "embedding_scale", "inner_layernorm", "norm_before_bmm1", "share_embedding_table"),
    ),
)

HF_LAYER = "transformer.h.{layer}."


def hf_linear(target: str, *logical: str, transposed: bool) -> tuple[TargetRule, ...]:
    """A linear layer, whose bias is always there; several logical layers are joined."""
    weights = tuple(Input(LOGICAL + name + ".weight") for name in logical)
    biases = tuple(Input(LOGICAL + name + ".bias", zeros_for=LOGICAL + name + ".weight") for name in logical)
    return (
        TargetRule(HF_LAYER + target + ".weight", weights, transposed=transposed),
        TargetRule(HF_LAYER + target + ".bias", biases),
    )


def hf_table(*, transposed: bool) -> tuple[TargetRule, ...]:
    """GPT-2's names. transformers' Conv1D stores weights `transposed`, ``[in, out]``; GPTBigCode has plain ones."""
    linear_of = partial(hf_linear, transposed=transposed)
    return (
        tensor("transformer.wte.weight", "embedding.weight", scope=Scope.FIRST),
        tensor("transformer.wpe.weight", "position_embedding.weight", scope=Scope.FIRST),
        *norm(HF_LAYER + "ln_1", LOGICAL + "attention.norm", bias=True),
        *linear_of("attn.c_attn", "attention.query", "attention.key", "attention.value"),
        *linear_of("attn.c_proj", "attention.output"),
        *norm(HF_LAYER + "ln_2", LOGICAL + "mlp.norm", bias=True),
        *linear_of("mlp.c_fc", "mlp.up"),
        *linear_of("mlp.c_proj", "mlp.down"),
        *norm("transformer.ln_f", "final_norm", scope=Scope.LAST, bias=True),
        tensor("lm_head.weight", "head.weight", scope=Scope.LAST, when=untied),
    )


TABLE = hf_table(transposed=True)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """GPT2Config (transformers/models/gpt2/configuration_gpt2.py)."""
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


HF_LIMITS = (
    (lambda m: m.position_embedding == "learned_absolute", "it has learned positions only"),
    (lambda m: m.normalization == "LayerNorm", "it has LayerNorm only"),
    (lambda m: not m.gated, "its MLP is not gated"),
    (lambda m: m.activation in ("gelu", "gelu_tanh"), "its activation is a gelu"),
    (lambda m: m.num_query_groups == m.num_attention_heads, "it has as many key/value heads as query heads"),
    (lambda m: m.head_size * m.num_attention_heads == m.hidden_size, "its head size is hidden size / heads"),
    (lambda m: not m.qk_norm, "it has no q/k norm"),
    (lambda m: m.window_size is None, "it has no attention window"),
    hf.DENSE,
)

GPT = Family(
    name="gpt",
    description="LayerNorm: GPT-2, GPT-3 and their kin",
    unmet=unmet,
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
    source_rules=DENSE_GPT,
    architectures={
        "trtllm": (ENGINE,),
        "hf": (HuggingFaceModel(name="GPT2LMHeadModel", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
)
