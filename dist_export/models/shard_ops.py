"""Shard operations: which part of a logical tensor a tensor-parallel rank holds, and back.

`take` gives one tp rank's view; `restore` rebuilds the logical tensor from all tp ranks' views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig
from dist_export.tensors.views import View, concatenate


class TensorParallel(Struct, frozen=True):
    """A position on the tp axis."""

    rank: int
    size: int


class ShardOp(Protocol):
    """A logical tensor <-> its tensor-parallel shards."""

    def take(self, view: View, tp: TensorParallel, config: ModelConfig) -> View:
        """The shard of `tp.rank`; `ExportError` when the sizes do not divide."""

    def restore(self, shards: Sequence[View], config: ModelConfig) -> View:
        """The logical tensor from the shards of all tp ranks, in rank order."""


class Replicate(Struct, frozen=True):
    """Every rank holds all of it: norms, biases added after the all-reduce."""

    def take(self, view: View, tp: TensorParallel, config: ModelConfig) -> View:
        return view

    def restore(self, shards: Sequence[View], config: ModelConfig) -> View:
        return shards[0]


class OnFirstRank(Struct, frozen=True):
    """The first rank holds all of it, the others zeros: biases that every rank adds before an all-reduce."""

    def take(self, view: View, tp: TensorParallel, config: ModelConfig) -> View:
        return view if tp.rank == 0 else View.zeros(view.shape)

    def restore(self, shards: Sequence[View], config: ModelConfig) -> View:
        return shards[0]


class Slice(Struct, frozen=True):
    """Equal slices along `dim`, exact or refused."""

    dim: int

    def take(self, view: View, tp: TensorParallel, config: ModelConfig) -> View:
        size = view.shape[self.dim]
        if size % tp.size:
            raise ExportError(f"dim {self.dim} of shape {list(view.shape)} does not divide by tp {tp.size}")
        return view.narrow(self.dim, tp.rank * (size // tp.size), size // tp.size)

    def restore(self, shards: Sequence[View], config: ModelConfig) -> View:
        return concatenate(shards, self.dim)


class SliceHeads(Struct, frozen=True):
    """Query heads, divided among the ranks along dim 0."""

    def take(self, view: View, tp: TensorParallel, config: ModelConfig) -> View:
        if config.num_attention_heads % tp.size:
            raise ExportError(f"{config.num_attention_heads} attention heads do not divide by tp {tp.size}")
        return Slice(0).take(view, tp, config)

    def restore(self, shards: Sequence[View], config: ModelConfig) -> View:
        return concatenate(shards, 0)


class SliceKeyValueHeads(Struct, frozen=True):
    """Key/value heads along dim 0; with fewer heads than ranks each head is repeated tp/heads times in a row.

    Rank r then holds head ``r // (tp / heads)`` (tensorrt_llm/models/convert_utils.py, ``dup_kv_weight``).
    """

    def take(self, view: View, tp: TensorParallel, config: ModelConfig) -> View:
        num_heads = config.num_query_groups
        if num_heads >= tp.size:
            if num_heads % tp.size:
                raise ExportError(f"{num_heads} key/value heads do not divide by tp {tp.size}")
            return Slice(0).take(view, tp, config)
        if tp.size % num_heads:
            raise ExportError(f"tp {tp.size} is not a multiple of the {num_heads} key/value heads to repeat")
        rows = view.shape[0] // num_heads
        return view.narrow(0, tp.rank // (tp.size // num_heads) * rows, rows)

    def restore(self, shards: Sequence[View], config: ModelConfig) -> View:
        step = max(len(shards) // config.num_query_groups, 1)
        return concatenate(shards[::step], 0)


class SlicePadded(Struct, frozen=True):
    """Equal slices of dim 0 after zero rows round it up to a multiple of tp.

    tensorrt_llm/models/convert_utils.py, ``split_matrix_tp`` of a table padded by
    tensorrt_llm/_utils.py, ``pad_vocab_size``: the rule depends on tp alone.
    """

    num_rows: Callable[[ModelConfig], int]
    """Rows of the logical tensor, so that `restore` knows which are padding."""

    def take(self, view: View, tp: TensorParallel, config: ModelConfig) -> View:
        rows = -(-view.shape[0] // tp.size)
        return view.pad(0, rows * tp.size).narrow(0, tp.rank * rows, rows)

    def restore(self, shards: Sequence[View], config: ModelConfig) -> View:
        return concatenate(shards, 0).narrow(0, 0, self.num_rows(config))


REPLICATE = Replicate()
ON_FIRST_RANK = OnFirstRank()
COLUMN = Slice(0)
"""Column-parallel: the output dim of a weight, its bias along."""
ROW = Slice(1)
"""Row-parallel: the input dim of a weight."""
HEADS = SliceHeads()
KEY_VALUE_HEADS = SliceKeyValueHeads()
