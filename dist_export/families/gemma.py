"""Gemma: zero-centred RMSNorm, word embeddings scaled by sqrt(hidden_size), a gated gelu MLP, tied embeddings.

Trained by NeMo and Megatron-Bridge (megatron/bridge/models/gemma/gemma_bridge.py names both sides). Every consumer
scales the embeddings itself; TensorRT-LLM stores one plus the norms' weights, the others add it, as Megatron does.
"""

from __future__ import annotations

from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig
from dist_export.models.features import EMBEDDING_SCALING
from dist_export.models.megatron import DENSE_GPT
from dist_export.models.rules import Family, Scope, TargetRule, never
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.huggingface.tables import LAYER as HF_LAYER
from dist_export.targets.huggingface.tables import LOGICAL, minus_one
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm.architecture import EngineModel, ReleaseLimit
from dist_export.targets.trtllm.releases import COMMON_KEYS, Keys, Span
from dist_export.targets.trtllm.tables import (
    COLUMN_PARALLEL,
    ROW_PARALLEL,
    EmbeddingSharding,
    decoder_layer,
    ends,
    linear,
)


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not of the Gemma kind, whichever generation."""
    gelu = config.activation in ("gelu", "gelu_tanh")
    wanted = (
        (config.embedding_scaling, "word embeddings are not scaled"),
        (config.normalization == "RMSNorm", f"normalization is {config.normalization}, not RMSNorm"),
        (config.gated and gelu, f"the MLP is not a gated gelu one ({config.activation})"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
        (config.num_experts == 0, f"it has {config.num_experts} experts"),
        (not config.qkv_bias and not config.linear_bias, "it has biases"),
    )
    return [reason for holds, reason in wanted if not holds]


def check_embedding(embedding: EmbeddingSharding) -> None:
    """Raise `ExportError` for a choice that GemmaConfig overrules: with tp the vocabulary is always divided."""
    if embedding != EmbeddingSharding():
        raise ExportError(
            "Gemma in TensorRT-LLM always divides its embedding by vocabulary rows: "
            "leave out --no-parallel-embedding and --embedding-sharding-dim"
        )


MLP = (
    *linear("attention.dense", "attention.output", ROW_PARALLEL, bias=never),
    *linear("mlp.fc", "mlp.gate", COLUMN_PARALLEL, bias=never),
    *linear("mlp.gate", "mlp.up", COLUMN_PARALLEL, bias=never),
    *linear("mlp.proj", "mlp.down", ROW_PARALLEL, bias=never),
)


def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """GemmaForCausalLM (tensorrt_llm/models/gemma/model.py): norms hold one plus the weight."""
    check_embedding(embedding)
    return (*ends(embedding), *decoder_layer(), *MLP)


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """GemmaConfig. Up to 0.15 the class takes the embedding for its head: equal to the one that is written beside it.

    A gated MLP takes the plain name of its activation, and only ``gelu`` is fused.
    """
    return {
        "hidden_act": trtllm.PLAIN_ACTIVATIONS[model.activation],
        "attn_bias": False,
        "mlp_bias": False,
        "inter_layernorms": model.post_norms,
        "share_embedding_table": True,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
    }


ENGINE_LIMITS = (
    *trtllm.ANY_CLASS,
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not passed to its attention"),
    (lambda m: not m.rotary_interleaved, "interleaved rotary embeddings are not passed to its attention"),
)
SHARED_HEAD = Span("0.13", "0.15")
RELEASE_LIMITS = (
    ReleaseLimit(SHARED_HEAD, lambda m, layout: m.tied_embeddings, "the head is the embedding there, always"),
    ReleaseLimit(
        SHARED_HEAD, lambda m, layout: layout.pp_size == 1, "a head that is the embedding cannot be on another stage"
    ),
)
KEYS = Keys((*COMMON_KEYS, "attn_bias", "mlp_bias"), ("inter_layernorms", "share_embedding_table"))

ENGINE = EngineModel(
    name="GemmaForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=ENGINE_LIMITS,
    keys=KEYS,
    releases=Span("0.13"),  # 0.12 has no GemmaConfig
    release_limits=RELEASE_LIMITS,
)


def hf_norm(target: str, logical: str) -> tuple[TargetRule, ...]:
    """A norm of a layer, whose weight is stored without its one."""
    return hf_tables.norm(HF_LAYER + target, LOGICAL + logical, values=minus_one)


HF_COMMON = (
    *hf_tables.ENDS,
    *hf_norm("input_layernorm", "attention.norm"),
    *hf_tables.ATTENTION,
    *hf_tables.linear(HF_LAYER + "mlp.gate_proj", LOGICAL + "mlp.gate", bias=never),
    *hf_tables.linear(HF_LAYER + "mlp.up_proj", LOGICAL + "mlp.up", bias=never),
    *hf_tables.linear(HF_LAYER + "mlp.down_proj", LOGICAL + "mlp.down", bias=never),
    *hf_tables.norm("model.norm", "final_norm", scope=Scope.LAST, values=minus_one),
)
TABLE = (*HF_COMMON, *hf_norm("post_attention_layernorm", "mlp.norm"))


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """GemmaConfig (transformers/models/gemma/configuration_gemma.py): the activation has had two names."""
    fields = hf.decoder_fields(model)
    del fields["mlp_bias"]
    return {
        "model_type": "gemma",
        **fields,
        "hidden_activation": hf.ACTIVATIONS[model.activation],
        "rms_norm_eps": model.norm_epsilon,
    }


HF_ANY = (
    (lambda m: m.activation == "gelu_tanh", "its gelu is the tanh form; if that is meant, --set activation=gelu_tanh"),
    (lambda m: m.rotary_percent == 1.0, "partial rotary embeddings are not expressible"),
    (lambda m: m.rope_scaling is None, "rotary scaling is not expressible"),
)
"""Limits of every generation."""

GEMMA = Family(
    name="gemma",
    description="zero-centred RMSNorm, scaled embeddings, GeGLU: Gemma, CodeGemma",
    unmet=unmet,
    source_rules=DENSE_GPT,
    architectures={
        "trtllm": (ENGINE,),
        "hf": (HuggingFaceModel(name="GemmaForCausalLM", rules=TABLE, fields=hf_fields, limits=(*hf.ROPE, *HF_ANY)),),
    },
    features=frozenset({EMBEDDING_SCALING}),
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
