"""What the tables of TensorRT-LLM's engine models are made of.

Names are parameter paths of the Python model objects (tensorrt_llm/models/gpt/model.py and
llama/model.py, tensorrt_llm/layers/attention.py and mlp.py); a rank file must hold exactly these.
Layer numbers restart at 0 in every pipeline stage.
"""

from __future__ import annotations

from msgspec import Struct

from dist_export.models.megatron import any_bias, layer_norm, learned_positions
from dist_export.models.rules import Condition, Input, Scope, TargetRule, always
from dist_export.models.shard_ops import COLUMN, HEADS, KEY_VALUE_HEADS, REPLICATE, ROW, ShardOp, Slice, SlicePadded

LAYER = "transformer.layers.{layer}."
LOGICAL = "layers.{layer}."


class EmbeddingSharding(Struct, frozen=True):
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


def linear(
    target: str, logical: str, shards: tuple[ShardOp, ShardOp], *, bias: Condition, when: Condition = always
) -> tuple[TargetRule, ...]:
    """Weight and, where the class has one, bias of a linear layer. A bias the source lacks is zero."""
    weight = Input(LOGICAL + logical + ".weight", shards[0])
    bias_input = Input(LOGICAL + logical + ".bias", shards[1], zeros_for=weight.logical)
    return (
        TargetRule(LAYER + target + ".weight", (weight,), when=when),
        TargetRule(LAYER + target + ".bias", (bias_input,), when=both(bias, when)),
    )


def qkv(kind: str) -> tuple[Input, ...]:
    """All local query heads, then key heads, then value heads: not interleaved per group."""
    names = (LOGICAL + "attention.query.", LOGICAL + "attention.key.", LOGICAL + "attention.value.")
    return tuple(
        Input(name + kind, shard, name + "weight" if kind == "bias" else None)
        for name, shard in zip(names, QKV, strict=True)
    )


def norm(target: str, logical: str, scope: Scope = Scope.LAYER) -> tuple[TargetRule, ...]:
    """A norm; LayerNorm always has a bias there, written as zeros when the source has none."""
    weight = Input(logical + ".weight")
    return (
        TargetRule(target + ".weight", (weight,), scope),
        TargetRule(target + ".bias", (Input(logical + ".bias", zeros_for=weight.logical),), scope, when=layer_norm),
    )


def ends(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
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
        *norm("transformer.ln_f", "final_norm", Scope.LAST),
        TargetRule("lm_head.weight", (Input("head.weight", head),), Scope.LAST),
    )


def decoder_layer() -> tuple[TargetRule, ...]:
    """Both norms of a layer and its fused qkv; what follows differs between the classes."""
    return (
        *norm(LAYER + "input_layernorm", LOGICAL + "attention.norm"),
        TargetRule(LAYER + "attention.qkv.weight", qkv("weight")),
        TargetRule(LAYER + "attention.qkv.bias", qkv("bias"), when=any_bias),
        *norm(LAYER + "post_layernorm", LOGICAL + "mlp.norm"),
    )
