"""Names and shards of TensorRT-LLM's engine models: one table per model class.

Names are parameter paths of the Python model objects (tensorrt_llm/models/gpt/model.py and
llama/model.py, tensorrt_llm/layers/attention.py and mlp.py); a rank file must hold exactly these.
Layer numbers restart at 0 in every pipeline stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_export.models.megatron import any_bias, gated, layer_norm, learned_positions, linear_bias, not_gated
from dist_export.models.rules import Condition, Input, Scope, TargetRule, always
from dist_export.models.shard_ops import COLUMN, HEADS, KEY_VALUE_HEADS, REPLICATE, ROW, ShardOp, Slice, SlicePadded

LAYER = "transformer.layers.{layer}."
LOGICAL = "layers.{layer}."


@dataclass(frozen=True, slots=True)
class EmbeddingSharding:
    """How embedding tables are divided: TensorRT-LLM's use_parallel_embedding and embedding_sharding_dim."""

    parallel: bool = True
    dim: int = 0

    def table(self, rows: str) -> ShardOp:
        """The shard of a table whose number of rows is the `rows` field of the configuration."""
        if not self.parallel:
            return REPLICATE
        return SlicePadded(lambda config: int(getattr(config, rows))) if self.dim == 0 else Slice(1)


COLUMN_PARALLEL = (COLUMN, COLUMN)
"""Shards of weight and bias."""
QKV: tuple[ShardOp, ...] = (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
"""Shards of query, key and value."""
ROW_PARALLEL = (ROW, REPLICATE)
"""The bias is added once, after the all-reduce, so every rank holds all of it."""


def both(first: Condition, second: Condition) -> Condition:
    """Holds when both conditions hold."""
    return lambda config: first(config) and second(config)


def _linear(
    target: str, logical: str, shards: tuple[ShardOp, ShardOp], *, bias: Condition, when: Condition = always
) -> tuple[TargetRule, ...]:
    """Weight and, where the class has one, bias of a linear layer. A bias the source lacks is zero."""
    weight = Input(LOGICAL + logical + ".weight", shards[0])
    bias_input = Input(LOGICAL + logical + ".bias", shards[1], zeros_for=weight.logical)
    return (
        TargetRule(LAYER + target + ".weight", (weight,), when=when),
        TargetRule(LAYER + target + ".bias", (bias_input,), when=both(bias, when)),
    )


def _qkv(kind: str) -> tuple[Input, ...]:
    """All local query heads, then key heads, then value heads: not interleaved per group."""
    names = (LOGICAL + "attention.query.", LOGICAL + "attention.key.", LOGICAL + "attention.value.")
    return tuple(
        Input(name + kind, shard, name + "weight" if kind == "bias" else None)
        for name, shard in zip(names, QKV, strict=True)
    )


def _norm(target: str, logical: str, scope: Scope = Scope.LAYER) -> tuple[TargetRule, ...]:
    """A norm; LayerNorm always has a bias there, written as zeros when the source has none."""
    weight = Input(logical + ".weight")
    return (
        TargetRule(target + ".weight", (weight,), scope),
        TargetRule(target + ".bias", (Input(logical + ".bias", zeros_for=weight.logical),), scope, when=layer_norm),
    )


def _ends(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """First and last stage. The head is always written, tied or not: no release then has to guess."""
    head = SlicePadded(lambda config: config.vocab_size)
    return (
        TargetRule(
            "transformer.vocab_embedding.weight",
            (Input("embedding.weight", embedding.table("vocab_size")),),
            Scope.FIRST,
        ),
        TargetRule(
            "transformer.position_embedding.weight",
            (Input("position_embedding.weight", embedding.table("max_position_embeddings")),),
            Scope.FIRST,
            when=learned_positions,
        ),
        *_norm("transformer.ln_f", "final_norm", Scope.LAST),
        TargetRule("lm_head.weight", (Input("head.weight", head),), Scope.LAST),
    )


def _decoder_layer() -> tuple[TargetRule, ...]:
    return (
        *_norm(LAYER + "input_layernorm", LOGICAL + "attention.norm"),
        TargetRule(LAYER + "attention.qkv.weight", _qkv("weight")),
        TargetRule(LAYER + "attention.qkv.bias", _qkv("bias"), when=any_bias),
        *_norm(LAYER + "post_layernorm", LOGICAL + "mlp.norm"),
    )


def gpt_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """GPTForCausalLM: LayerNorm, plain or gated MLP (tensorrt_llm/models/gpt/model.py)."""
    return (
        *_ends(embedding),
        *_decoder_layer(),
        *_linear("attention.dense", "attention.output", ROW_PARALLEL, bias=any_bias),
        *_linear("mlp.fc", "mlp.up", COLUMN_PARALLEL, bias=any_bias, when=not_gated),
        *_linear("mlp.fc", "mlp.gate", COLUMN_PARALLEL, bias=any_bias, when=gated),
        *_linear("mlp.gate", "mlp.up", COLUMN_PARALLEL, bias=any_bias, when=gated),
        *_linear("mlp.proj", "mlp.down", ROW_PARALLEL, bias=any_bias),
    )


def llama_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """LlamaForCausalLM, dense: RMSNorm and a gated MLP where ``fc`` is the activated half.

    With attn_bias the class wants both qkv.bias and dense.bias; with mlp_bias all three of the MLP.
    """
    return (
        *_ends(embedding),
        *_decoder_layer(),
        *_linear("attention.dense", "attention.output", ROW_PARALLEL, bias=any_bias),
        *_linear("mlp.fc", "mlp.gate", COLUMN_PARALLEL, bias=linear_bias),
        *_linear("mlp.gate", "mlp.up", COLUMN_PARALLEL, bias=linear_bias),
        *_linear("mlp.proj", "mlp.down", ROW_PARALLEL, bias=linear_bias),
    )


def mixtral_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
    """MixtralForCausalLM: the Llama class with experts (tensorrt_llm/layers/moe.py).

    The experts of a rank are stacked; within one the linear half (w3) comes before the activated one (w1),
    the inverse of Megatron's order. The router is float32 and whole on every rank.
    """
    expert = LOGICAL + "experts.{expert}."
    up, gate = Input(expert + "up.weight", COLUMN), Input(expert + "gate.weight", COLUMN)
    return (
        *_ends(embedding),
        *_decoder_layer(),
        *_linear("attention.dense", "attention.output", ROW_PARALLEL, bias=any_bias),
        TargetRule(LAYER + "mlp.router.weight", (Input(LOGICAL + "router.weight"),), dtype="float32"),
        TargetRule(LAYER + "mlp.fc.weight", (up, gate)),
        TargetRule(LAYER + "mlp.proj.weight", (Input(expert + "down.weight", ROW),)),
    )


TABLES = {"GPTForCausalLM": gpt_rules, "LlamaForCausalLM": llama_rules, "MixtralForCausalLM": mixtral_rules}
"""Architecture name in config.json -> its table."""
