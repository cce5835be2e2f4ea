"""Tensor names of a legacy Megatron-Core file -> the names that a ``torch_dist`` checkpoint has for them.

In a legacy file layers are numbered within the model chunk and experts within the rank, and experts are named by the
module that computed them (megatron/core/transformer/moe/experts.py): ``SequentialMLP`` has a module per expert,
``TEGroupedMLP`` a weight per expert (or one stacked over them), ``GroupedMLP`` two matrices for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum

from dist_export.checkpoint.legacy_shards import Shard
from dist_export.errors import ExportError


class Split(Enum):
    """How tp ranks share a tensor (megatron/core/tensor_parallel/layers.py)."""

    REPLICATED = "every rank has all of it"
    ROWS = "along dim 0"
    COLUMNS = "along dim 1"
    GATE_UP = "along dim 0; a gated one as [gate; up] on every rank"

    @property
    def num_dims(self) -> int:
        """Dims that a tensor must have to be shared so."""
        return {Split.REPLICATED: 0, Split.COLUMNS: 2}.get(self, 1)


_SPLITS: tuple[tuple[re.Pattern[str], Split], ...] = tuple(
    (re.compile(rf"(^|\.)({pattern})$"), split)
    for pattern, split in (
        (r"linear_fc1\.(weight|bias)", Split.GATE_UP),
        (r"linear_fc1\.(weight|bias)_[wv]", Split.ROWS),
        (r"(word_embeddings|output_layer|linear_qkv|eh_proj)\.(weight|bias)", Split.ROWS),
        (r"(linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.weight", Split.ROWS),
        (r"core_attention\.softmax_offset", Split.ROWS),
        (r"(self_attention|mlp)\.weight", Split.ROWS),  # one linear layer in the place of either
        (r"(linear_proj|linear_fc2)\.weight", Split.COLUMNS),
        (r"(linear_proj|linear_fc2)\.bias", Split.REPLICATED),
        (r"\w*norm[._](weight|bias)|\w+\.layer_norm_(weight|bias)", Split.REPLICATED),
        (r"position_embeddings\.weight", Split.REPLICATED),
        (r"router\.(weight|bias|expert_bias)|shared_experts\.gate_weight", Split.REPLICATED),
    )
)
_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^(?P<moe>.*\.mlp)\.experts\.(?P<rest>.*)$")
_GLOBAL_EXPERT = re.compile(r"^(?P<head>.*\.experts\.experts\.)(?P<expert>\d+)\.")
_QUANTIZER = r"(?:\w+_)?quantizer(?:\.\d+)?\.\w+"
_SEQUENTIAL = re.compile(
    rf"local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12])\.(?P<kind>weight|bias|{_QUANTIZER})"
)
_TE_QUANTIZER = re.compile(
    r"(?P<linear>linear_fc[12])\.(?P<quantizer>(?:\w+_)?quantizer)(?:\.(?P<expert>\d+))?(?P<buffer>(?:\.\d+)?\.\w+)"
)
_TE_GROUPED = re.compile(r"(?P<linear>linear_fc[12])\.(?P<kind>weight|bias)(?P<expert>\d*)")
_GROUPED = {"weight1": "linear_fc1", "weight2": "linear_fc2"}


def split_of(name: str) -> Split | None:
    """How tp ranks share the tensor `name`, or None when that is not known."""
    return next((split for pattern, split in _SPLITS if pattern.search(name)), None)


def local_layer(name: str) -> int | None:
    """The number of the layer within its model chunk, or None outside of layers."""
    match = _LOCAL_LAYER.match(name)
    return int(match[1]) if match else None


def global_name(name: str, first_layer: int, first_expert: int = 0) -> str:
    """`name` with the layer and expert numbers of the whole model. MTP modules get the name they have on disk."""
    layer = local_layer(name)
    if layer is not None:
        name = _LOCAL_LAYER.sub(f"decoder.layers.{layer + first_layer}.", name)
    match = _GLOBAL_EXPERT.match(name)
    if match:
        name = f"{match['head']}{int(match['expert']) + first_expert}.{name[match.end() :]}"
    return re.sub(r"^(mtp\.layers\.\d+)\.mtp_model_layer\.", r"\1.transformer_layer.", name)


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to the experts of its ep rank, not to those shared by all tokens."""
    return _EXPERT.match(name) is not None


def router_of(name: str) -> str:
    """The router's weight beside an expert tensor."""
    match = _EXPERT.match(name)
    assert match is not None, f"{name} is of no expert"
    return f"{match['moe']}.router.weight"


def expert_tensors(name: str, shard: Shard, num_experts: int, *, where: str) -> Iterator[tuple[str, Shard]]:
    """One expert's tensors each, ``[out, in]``, under ``experts.experts.{number within the rank}``.

    `num_experts` are those of the rank. Raises `ExportError` for names and shapes that no expert module has.
    """
    match = _EXPERT.match(name)
    assert match is not None, f"{name} is of no expert"
    head, rest = f"{match['moe']}.experts.experts.", match["rest"]
    if rest in _GROUPED:
        linear = _GROUPED[rest]
        parts = _grouped(shard, num_experts, is_first=rest == "weight1", where=f"{where}: {name}")
        yield from ((f"{head}{expert}.{linear}.weight", part) for expert, part in enumerate(parts))
        return
    quantizer = _TE_QUANTIZER.fullmatch(rest)
    found = quantizer or _SEQUENTIAL.fullmatch(rest) or _TE_GROUPED.fullmatch(rest)
    if found is None:
        raise ExportError(f"{where}: {name} is no tensor of a known expert module")
    kind = f"{quantizer['quantizer']}{quantizer['buffer']}" if quantizer else found["kind"]
    tail = f".{found['linear']}.{kind}"
    if found["expert"]:
        if int(found["expert"]) >= num_experts:
            raise ExportError(f"{where}: {name} is there, but the rank has {num_experts} experts")
        yield f"{head}{int(found['expert'])}{tail}", shard
    elif quantizer:  # of all experts of the rank
        yield from ((f"{head}{expert}{tail}", shard) for expert in range(num_experts))
    elif shard.shape[:1] == (num_experts,):
        yield from ((f"{head}{expert}{tail}", shard.select(expert)) for expert in range(num_experts))
    else:
        raise ExportError(f"{where}: {name} has shape {list(shard.shape)}, expected {num_experts} experts in dim 0")


def _grouped(shard: Shard, num_experts: int, *, is_first: bool, where: str) -> Iterator[Shard]:
    """``weight1`` [hidden, experts x rows] is memory of [experts, hidden, rows], ``weight2`` [experts x columns,
    hidden] of [experts, columns, hidden]: both hold each expert's matrix transposed (``GroupedMLP.forward``)."""
    wide = 1 if is_first else 0
    if len(shard.shape) != 2 or shard.shape[wide] % num_experts or not shard.is_row_major:
        raise ExportError(f"{where} of shape {list(shard.shape)} is no matrix of {num_experts} experts, or has gaps")
    each = shard.shape[wide] // num_experts
    shape = (num_experts, shard.shape[0], each) if is_first else (num_experts, each, shard.shape[1])
    memory = shard.reshaped(shape)
    return (memory.select(expert).transposed() for expert in range(num_experts))


def second_linear(name: str) -> str:
    """The weight of ``linear_fc2`` beside a tensor of ``linear_fc1``."""
    return f"{name.rpartition('linear_fc1.')[0]}linear_fc2.weight"


def is_gated(first: Shard, second: Shard | None, *, where: str) -> bool:
    """Whether fc1 holds gate and up: twice as many rows as fc2 has columns, on the same rank."""
    if second is None or len(second.shape) != 2:
        raise ExportError(f"{where}: there is no linear_fc2.weight beside it, so whether it is gated is not known")
    rows, columns = first.shape[0], second.shape[1] * (2 if second.dtype == "uint8" else 1)  # two FP4 or INT4 in a byte
    if rows not in (columns, 2 * columns):
        raise ExportError(f"{where} has {rows} rows on a rank, expected {columns} or {2 * columns} for its linear_fc2")
    return rows == 2 * columns
