"""StarCoder2-style models: LayerNorm, rope, a plain MLP, grouped queries, perhaps an attention window."""

from __future__ import annotations

from msgspec.structs import replace

from dist_export.families import gpt
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT, any_bias
from dist_export.models.rules import Family, Scope
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.huggingface.tables import ENDS, LAYER, LOGICAL, linear, norm


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not StarCoder2-style."""
    wanted = (
        (not config.zero_centered_norm, "norms are zero-centred"),
        (config.activation in ("gelu", "gelu_tanh") and not config.gated, "the MLP is not a plain gelu one"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
    )
    return gpt.unmet(config) + [reason for holds, reason in wanted if not holds]


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """GPTConfig; the variant is a hint for converters."""
    return {**gpt.engine_fields(model), "gpt_variant": "starcoder2"}


TABLE = (
    *ENDS,
    *norm(LAYER + "input_layernorm", LOGICAL + "attention.norm", bias=True),
    *linear(LAYER + "self_attn.q_proj", LOGICAL + "attention.query", bias=any_bias),
    *linear(LAYER + "self_attn.k_proj", LOGICAL + "attention.key", bias=any_bias),
    *linear(LAYER + "self_attn.v_proj", LOGICAL + "attention.value", bias=any_bias),
    *linear(LAYER + "self_attn.o_proj", LOGICAL + "attention.output", bias=any_bias),
    *norm(LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm", bias=True),
    *linear(LAYER + "mlp.c_fc", LOGICAL + "mlp.up", bias=any_bias),
    *linear(LAYER + "mlp.c_proj", LOGICAL + "mlp.down", bias=any_bias),
    *norm("model.norm", "final_norm", scope=Scope.LAST, bias=True),
)
"""``use_bias`` is one switch for all linear layers (transformers/models/starcoder2/modeling_starcoder2.py)."""


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """Starcoder2Config (transformers/models/starcoder2/configuration_starcoder2.py)."""
    fields = hf.decoder_fields(model)
    for name in ("attention_bias", "mlp_bias"):
        del fields[name]
    return {
        "model_type": "starcoder2",
        **fields,
        "use_bias": any_bias(model),
        "norm_epsilon": model.norm_epsilon,
        "sliding_window": hf.sliding_window(model),
        "rope_scaling": hf.rope_scaling(model),
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    }


HF_LIMITS = (
    *hf.ROPE_IN_A_WINDOW,
    hf.DENSE,
    (lambda m: m.normalization == "LayerNorm" and not m.zero_centered_norm, "its norms are plain LayerNorm"),
    (lambda m: not m.gated, "its MLP is not gated"),
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not expressible"),
)

STARCODER2 = Family(
    name="starcoder2",
    description="LayerNorm, rope, plain gelu, grouped queries: StarCoder2",
    unmet=unmet,
    source_rules=DENSE_GPT,
    architectures={
        "trtllm": (replace(gpt.ENGINE, fields=engine_fields),),
        "hf": (HuggingFaceModel(name="Starcoder2ForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
