"""GPT-Next and Nemotron: zero-centred LayerNorm, squared ReLU, partly rotary positions."""

from __future__ import annotations

from dist_export.families import gpt
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT, linear_bias
from dist_export.models.rules import Family, Scope
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.huggingface.tables import LAYER as HF_LAYER
from dist_export.targets.huggingface.tables import LOGICAL, minus_one, norm


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Nemotron-style."""
    wanted = (
        (config.zero_centered_norm, "norms are not zero-centred"),
        (config.activation == "squared_relu" and not config.gated, f"the activation is {config.activation}"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
    )
    return gpt.unmet(config) + [reason for holds, reason in wanted if not holds]


TABLE = (
    *hf_tables.ENDS,
    *norm(HF_LAYER + "input_layernorm", LOGICAL + "attention.norm", values=minus_one, bias=True),
    *hf_tables.ATTENTION,
    *norm(HF_LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm", values=minus_one, bias=True),
    *hf_tables.linear(HF_LAYER + "mlp.up_proj", LOGICAL + "mlp.up", bias=linear_bias),
    *hf_tables.linear(HF_LAYER + "mlp.down_proj", LOGICAL + "mlp.down", bias=linear_bias),
    *norm("model.norm", "final_norm", scope=Scope.LAST, values=minus_one, bias=True),
)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """NemotronConfig (transformers/models/nemotron/configuration_nemotron.py)."""
    return {
        "model_type": "nemotron",
        **hf.decoder_fields(model),
        "norm_eps": model.norm_epsilon,
        "partial_rotary_factor": model.rotary_percent,
    }


HF_LIMITS = (
    *hf.ROPE,
    hf.DENSE,
    (lambda m: m.normalization == "LayerNorm" and m.zero_centered_norm, "its norms are zero-centred LayerNorm"),
    (lambda m: not m.gated, "its MLP is not gated"),
    (lambda m: m.rope_scaling is None, "rotary scaling is not expressible"),
)

NEMOTRON = Family(
    name="nemotron",
    description="zero-centred LayerNorm, squared ReLU, rope: GPT-Next, Nemotron-3/4, Minitron",
    unmet=unmet,
    witnesses={"trtllm": "TensorRT-LLM 0.14's GPT converter, +1 on norms", "hf": "transformers"},
    source_rules=DENSE_GPT,
    architectures={
        "trtllm": (gpt.ENGINE,),
        "hf": (HuggingFaceModel(name="NemotronForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
)
