"""DeciLM, Nemotron-NAS: the Llama base with layers that differ. Attention and MLP of a layer have sizes of their own,
or one linear layer or nothing stands in their place."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from dist_export.families import llama
from dist_export.models.blocks import Block, ffn_size_of
from dist_export.models.config import ModelConfig
from dist_export.models.features import BLOCKS
from dist_export.models.megatron import DENSE_GPT, LAYER, linear_bias, norm_rules
from dist_export.models.rules import Family, Input, LayerCondition, Scope, SourceRule, TargetRule
from dist_export.models.shard_ops import COLUMN
from dist_export.plan.layout import TargetLayout
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel, Limit
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm import tables
from dist_export.targets.trtllm.architecture import EngineModel, ReleaseLimit
from dist_export.targets.trtllm.releases import ALL, COMMON_KEYS, Keys, Span


def blocks_of(config: ModelConfig) -> tuple[Block, ...]:
    """The layers of a model of this family."""
    return config.blocks.layers if config.blocks else ()


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not DeciLM."""
    return llama.unmet(config) + ([] if config.blocks else ["its layers are all alike"])


# --- source -----------------------------------------------------------------------------------------------------------

SOURCES = (
    *DENSE_GPT,
    SourceRule(LAYER + "self_attention.weight", ("layers.{layer}.linear_attention.weight",)),
    *norm_rules((LAYER + "self_attention.layer_norm_",), "layers.{layer}.attention.norm"),
    SourceRule(LAYER + "mlp.weight", ("layers.{layer}.linear_mlp.weight",)),
    *norm_rules((LAYER + "mlp.layer_norm_",), "layers.{layer}.mlp.norm"),
)
"""A linear layer in the place of attention or of the MLP has their norm within it, as TransformerEngine's fused layers
(models/gpt/heterogeneous/heterogeneous_layer_specs.py)."""

# --- which layers have what -------------------------------------------------------------------------------------------


def _attention(*kinds: str) -> LayerCondition:
    return lambda config, layer: blocks_of(config)[layer].attention in kinds


def _mlp(*kinds: str) -> LayerCondition:
    return lambda config, layer: blocks_of(config)[layer].mlp in kinds


def _of(layers: LayerCondition, rules: Iterable[TargetRule]) -> tuple[TargetRule, ...]:
    return tuple(replace(rule, layers=layers) for rule in rules)


# --- TensorRT-LLM -----------------------------------------------------------------------------------------------------


def engine_rules(embedding: tables.EmbeddingSharding) -> tuple[TargetRule, ...]:
    """DeciLMForCausalLM (tensorrt_llm/models/nemotron_nas/model.py): the MLP is called ``ffn``, and so is a linear
    layer in its place; such layers are column-parallel and their output is gathered."""
    first, second, qkv = (
        tables.LAYER + "input_layernorm",
        tables.LAYER + "post_layernorm",
        tables.LAYER + "attention.qkv",
    )
    linear_attention = Input(tables.LOGICAL + "linear_attention.weight", COLUMN)
    linear_mlp = Input(tables.LOGICAL + "linear_mlp.weight", COLUMN)
    output = tables.linear("attention.dense", "attention.output", tables.ROW_PARALLEL, bias=linear_bias)
    mlp = (
        *tables.linear("ffn.fc", "mlp.gate", tables.COLUMN_PARALLEL, bias=linear_bias),
        *tables.linear("ffn.gate", "mlp.up", tables.COLUMN_PARALLEL, bias=linear_bias),
        *tables.linear("ffn.proj", "mlp.down", tables.ROW_PARALLEL, bias=linear_bias),
    )
    return (
        *tables.ends(embedding),
        *_of(_attention("full", "linear"), tables.norm(first, tables.LOGICAL + "attention.norm")),
        *_of(_attention("full"), (TargetRule(qkv + ".weight", tables.qkv("weight")), *output)),
        *_of(_attention("linear"), [TargetRule(tables.LAYER + "attention.weight", (linear_attention,))]),
        *_of(_mlp("full", "linear"), tables.norm(second, tables.LOGICAL + "mlp.norm")),
        *_of(_mlp("full"), mlp),
        *_of(_mlp("linear"), [TargetRule(tables.LAYER + "ffn.weight", (linear_mlp,))]),
    )


_KINDS = {"full": ("attention", "mlp"), "linear": ("linear", "linear"), "no_op": ("no_op", "no_op")}


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """DeciConfig (models/nemotron_nas/config.py); the lists of layer types and key/value heads follow from these."""
    return {
        "hidden_act": trtllm.PLAIN_ACTIVATIONS[model.activation],
        "layer_configs": [
            {
                "attention": {
                    "impl": _KINDS[block.attention][0],
                    "num_key_value_heads": block.num_query_groups or None,
                },
                "ffn": {"impl": _KINDS[block.mlp][1], "intermediate_size": block.ffn_hidden_size or None},
            }
            for block in blocks_of(model)
        ],
    }


def _heads_divide(model: ModelConfig, layout: TargetLayout) -> bool:
    tp = layout.tp_size
    groups = {block.num_query_groups for block in blocks_of(model) if block.num_query_groups}
    return all(number % tp == 0 or tp % number == 0 for number in groups)


def _ffns_divide(model: ModelConfig, layout: TargetLayout) -> bool:
    return all(block.ffn_hidden_size % layout.tp_size == 0 for block in blocks_of(model))


def _linears_divide(model: ModelConfig, layout: TargetLayout) -> bool:
    linear = any("linear" in (block.attention, block.mlp) for block in blocks_of(model))
    return not linear or model.hidden_size % layout.tp_size == 0


ENGINE = EngineModel(
    name="DeciLMForCausalLM",
    rules=engine_rules,
    fields=engine_fields,
    limits=(
        *llama.ENGINE_LIMITS,
        trtllm.DENSE,
        (lambda m: not m.linear_bias and not m.qkv_bias, "the class has no biases"),
        (lambda m: any(block.attention == "full" for block in blocks_of(m)), "no layer has attention"),
    ),
    keys=Keys(
        (*(key for key in COMMON_KEYS if key != "moe"), "layer_configs"),  # a `moe` there is taken for experts
        ("share_embedding_table",),
    ),
    releases=Span("0.14"),
    release_limits=(
        ReleaseLimit(ALL, _heads_divide, "key/value heads of some layer neither divide by tp nor divide it"),
        ReleaseLimit(ALL, _ffns_divide, "the ffn size of some layer does not divide by tp"),
        ReleaseLimit(ALL, _linears_divide, "the linear layer in the place of another does not divide by tp"),
    ),
)

# --- Hugging Face -----------------------------------------------------------------------------------------------------

HF_LAYER, LOGICAL = hf_tables.LAYER, hf_tables.LOGICAL

TABLE = (
    *hf_tables.ENDS,
    *_of(_attention("full", "linear"), hf_tables.norm(HF_LAYER + "input_layernorm", LOGICAL + "attention.norm")),
    *_of(_attention("full"), hf_tables.ATTENTION),
    *_of(
        _attention("linear"),
        [hf_tables.tensor(HF_LAYER + "self_attn.linear_attn.weight", LOGICAL + "linear_attention.weight")],
    ),
    *_of(_mlp("full", "linear"), hf_tables.norm(HF_LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm")),
    *(
        replace(
            hf_tables.tensor(f"{HF_LAYER}mlp.{part}_proj.weight", f"{LOGICAL}mlp.{part}.weight"), layers=_mlp("full")
        )
        for part in ("gate", "up", "down")
    ),
    *_of(_mlp("linear"), [hf_tables.tensor(HF_LAYER + "mlp.linear_mlp.weight", LOGICAL + "linear_mlp.weight")]),
    *hf_tables.norm("model.norm", "final_norm", scope=Scope.LAST),
)
"""Names of the model's own code on the Hub (modeling_decilm.py), which tensorrt_llm/models/nemotron_nas/convert.py and
vLLM's model read."""


def ffn_multiple(size: int, hidden: int) -> float:
    """The number from which consumers compute an MLP's size again (`ffn_size_of`)."""
    return 3 * size / (2 * hidden)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """DeciLMConfig (configuration_decilm.py of the published models)."""
    fields = hf.decoder_fields(model)
    for name in ("head_dim", "intermediate_size", "num_key_value_heads"):
        fields.pop(name)
    return {
        "model_type": "nemotron-nas",
        **fields,
        "intermediate_size": None,
        "num_key_value_heads": None,
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": hf.rope_scaling(model),
        "block_configs": [
            {
                "attention": {
                    "n_heads_in_group": model.num_attention_heads // block.num_query_groups
                    if block.num_query_groups
                    else None,
                    "no_op": block.attention == "no_op",
                    "replace_with_linear": block.attention == "linear",
                },
                "ffn": {
                    "ffn_mult": ffn_multiple(block.ffn_hidden_size, model.hidden_size)
                    if block.ffn_hidden_size
                    else None,
                    "no_op": block.mlp == "no_op",
                    "replace_with_linear": block.mlp == "linear",
                },
            }
            for block in blocks_of(model)
        ],
    }


def _sizes_come_back(model: ModelConfig) -> bool:
    sizes = {block.ffn_hidden_size for block in blocks_of(model) if block.ffn_hidden_size}
    return all(ffn_size_of(ffn_multiple(size, model.hidden_size), model.hidden_size) == size for size in sizes)


def hf_notes(model: ModelConfig) -> tuple[str, ...]:
    """transformers has no such class."""
    return (
        "the folder has no code of the model (configuration_decilm.py and what it imports), which transformers and "
        "vLLM load: copy it from a published model of this kind, and with it auto_map of its config.json",
    )


HF_LIMITS: tuple[Limit, ...] = (
    *llama.HF_LIMITS,
    hf.DENSE,
    (lambda m: not m.linear_bias and not m.qkv_bias, "it has no biases"),
    (lambda m: m.head_size * m.num_attention_heads == m.hidden_size, "its head size is hidden size / heads"),
    (_sizes_come_back, "its MLP sizes are multiples of 256"),
)

DECILM = Family(
    name="decilm",
    description="the Llama base with layers that differ: DeciLM, Nemotron-NAS (Llama-Nemotron 51B, 49B, 253B)",
    unmet=unmet,
    source_rules=SOURCES,
    architectures={
        "trtllm": (ENGINE,),
        "hf": (
            HuggingFaceModel(name="DeciLMForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS, notes=hf_notes),
        ),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "the names that this converter reads"},
    features=frozenset({BLOCKS}),
)
