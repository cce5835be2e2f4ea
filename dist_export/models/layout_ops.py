"""Layout operations: how rows of one tensor become rows of others. Each has its inverse beside it.

An operation turns views into views, so it moves no data (see `dist_export.tensors.views`); applied to
a Megatron tensor it gives the logical tensors of a model, and its inverse rebuilds the Megatron tensor
from those. All weights are ``[out, in]``; biases are 1-D and follow dim 0 of their weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig
from dist_export.tensors.views import View, concatenate


class LayoutOp(Protocol):
    """One Megatron tensor <-> its logical parts."""

    def split(self, view: View, config: ModelConfig) -> tuple[View, ...]:
        """The logical parts of `view`; `ExportError` when its shape does not fit `config`."""

    def join(self, parts: Sequence[View], config: ModelConfig) -> View:
        """The Megatron tensor made of `parts`: the inverse of `split`."""


class Same(Struct, frozen=True):
    """The tensor as it is."""

    def split(self, view: View, config: ModelConfig) -> tuple[View, ...]:
        return (view,)

    def join(self, parts: Sequence[View], config: ModelConfig) -> View:
        (view,) = parts
        return view


class SplitQKV(Struct, frozen=True):
    """Megatron's fused qkv <-> query, key, value.

    Rows are group-major: for each of the ``num_query_groups`` groups its query heads, one key head and
    one value head, each of ``head_size`` rows (megatron/core/transformer/attention.py,
    ``get_query_key_value_tensors``).
    """

    def split(self, view: View, config: ModelConfig) -> tuple[View, ...]:
        rows, expected = view.shape[0], sum(self._rows(config)) * config.num_query_groups
        if rows != expected:
            raise ExportError(
                f"fused qkv has {rows} rows, expected {expected} = (heads {config.num_attention_heads} + 2 x groups "
                f"{config.num_query_groups}) x head size {config.head_size}"
            )
        return tuple(view.gather(0, ranges) for ranges in self._ranges(config))

    def join(self, parts: Sequence[View], config: ModelConfig) -> View:
        rows = self._rows(config)
        return concatenate(
            [
                part.narrow(0, group * size, size)
                for group in range(config.num_query_groups)
                for part, size in zip(parts, rows, strict=True)
            ],
            0,
        )

    @staticmethod
    def _rows(config: ModelConfig) -> tuple[int, int, int]:
        """Rows of query, key and value within one group."""
        query = config.num_attention_heads // config.num_query_groups * config.head_size
        return query, config.head_size, config.head_size

    def _ranges(self, config: ModelConfig) -> list[list[tuple[int, int]]]:
        rows, ranges, start = self._rows(config), [[], [], []], 0  # type: ignore[var-annotated]
        for _ in range(config.num_query_groups):
            for part, size in enumerate(rows):
                ranges[part].append((start, size))
                start += size
        return ranges


class SplitHalves(Struct, frozen=True):
    """Gated ``linear_fc1`` <-> gate (first half, activated) and up (second half).

    On disk the global tensor is not interleaved by tp rank (megatron/core/transformer/mlp.py,
    ``apply_swiglu_sharded_factory``).
    """

    def split(self, view: View, config: ModelConfig) -> tuple[View, ...]:
        rows = view.shape[0]
        if rows % 2:
            raise ExportError(f"gated fc1 has {rows} rows, which cannot be halved into gate and up")
        return view.narrow(0, 0, rows // 2), view.narrow(0, rows // 2, rows // 2)

    def join(self, parts: Sequence[View], config: ModelConfig) -> View:
        return concatenate(parts, 0)


class SplitInterleaved(Struct, frozen=True):
    """Gated ``linear_fc1`` of experts trained with ``moe_mlp_glu_interleave_size`` <-> gate and up.

    On each expert-tp rank blocks of that many rows alternate, gate first (megatron/core/transformer/moe/experts.py,
    ``TEGroupedMLP._remove_glu_interleaving``). Saving knows nothing of it: the stored tensor is the first half of every
    rank's rows, then the second half of every rank's (mlp.py, ``apply_swiglu_sharded_factory``).
    """

    def split(self, view: View, config: ModelConfig) -> tuple[View, ...]:
        starts = self._block_starts(view.shape[0], config)
        size = config.moe_glu_interleave_size
        return tuple(view.gather(0, [(start, size) for start in starts[part::2]]) for part in (0, 1))

    def join(self, parts: Sequence[View], config: ModelConfig) -> View:
        size = config.moe_glu_interleave_size
        starts = self._block_starts(2 * parts[0].shape[0], config)
        blocks = {start: (parts[number % 2], number // 2 * size) for number, start in enumerate(starts)}
        return concatenate([part.narrow(0, at, size) for _, (part, at) in sorted(blocks.items(), key=_first)], 0)

    @staticmethod
    def _block_starts(rows: int, config: ModelConfig) -> list[int]:
        """First row of every block as stored, in the order of ranks and of the rows on a rank."""
        size, ranks = config.moe_glu_interleave_size, config.moe_glu_interleave_num_shards
        if rows % (2 * size * ranks):
            raise ExportError(
                f"gated fc1 of experts has {rows} rows, which {ranks} expert-tp ranks cannot share in pairs of blocks "
                f"of {size} rows"
            )
        half = rows // 2 // ranks  # of one rank's rows
        return [
            row // half * (rows // 2) + rank * half + row % half
            for rank in range(ranks)
            for row in range(0, 2 * half, size)
        ]


def _first(item: tuple[int, object]) -> int:
    return item[0]


class SplitKeyValueUp(Struct, frozen=True):
    """``linear_kv_up_proj`` of latent attention <-> its unrotated keys and its values.

    Rows go head by head: of each head first the ``qk_nope_head_size`` of its keys, then the ``value_head_size`` of its
    values (megatron/core/transformer/multi_latent_attention.py, ``get_query_key_value_tensors``).
    """

    def split(self, view: View, config: ModelConfig) -> tuple[View, ...]:
        rows, expected = view.shape[0], sum(self._sizes(config)) * config.num_attention_heads
        if rows != expected:
            raise ExportError(f"has {rows} rows, expected {expected} = heads x (unrotated keys + values)")
        key, value = self._sizes(config)
        starts = [head * (key + value) for head in range(config.num_attention_heads)]
        return view.gather(0, [(at, key) for at in starts]), view.gather(0, [(at + key, value) for at in starts])

    def join(self, parts: Sequence[View], config: ModelConfig) -> View:
        return concatenate(
            [
                part.narrow(0, head * size, size)
                for head in range(config.num_attention_heads)
                for part, size in zip(parts, self._sizes(config), strict=True)
            ],
            0,
        )

    @staticmethod
    def _sizes(config: ModelConfig) -> tuple[int, int]:
        """Rows of a head's keys and of its values."""
        return config.qk_nope_head_size, config.value_head_size


class TrimVocabulary(Struct, frozen=True):
    """Padded vocabulary rows <-> the true vocabulary. The rows beyond it are Megatron's padding.

    With `copies` the same rows are also given as further logical tensors: tied embeddings feed the head.
    """

    copies: int = 1

    def split(self, view: View, config: ModelConfig) -> tuple[View, ...]:
        if view.shape[0] != config.padded_vocab_size:
            raise ExportError(f"vocabulary has {view.shape[0]} rows, expected {config.padded_vocab_size} (padded)")
        return (view.narrow(0, 0, config.vocab_size),) * self.copies

    def join(self, parts: Sequence[View], config: ModelConfig) -> View:
        """The padding rows come back as zeros; what Megatron had there is not part of the model."""
        return parts[0].pad(0, config.padded_vocab_size)


SAME = Same()
SPLIT_QKV = SplitQKV()
SPLIT_HALVES = SplitHalves()
SPLIT_INTERLEAVED = SplitInterleaved()
SPLIT_KEY_VALUE_UP = SplitKeyValueUp()
