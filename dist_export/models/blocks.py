"""Layers that differ: what stands in the place of attention and of the MLP of each, and how large they are.

Found by architecture search (Nemotron-NAS) and written by Megatron into its arguments as the JSON of a Hugging Face
configuration (megatron/core/transformer/heterogeneous/heterogeneous_config.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

from msgspec import Struct

from dist_export.errors import ExportError

Kind = Literal["full", "linear", "no_op"]
"""Attention or an MLP as such, one linear layer in its place, or nothing."""
KINDS: tuple[str, ...] = get_args(Kind)


class Block(Struct, frozen=True):
    """One layer. Sizes are 0 where there is nothing to have them."""

    attention: Kind
    num_query_groups: int
    mlp: Kind
    ffn_hidden_size: int

    def __post_init__(self) -> None:
        pairs = (("attention", self.attention, self.num_query_groups), ("mlp", self.mlp, self.ffn_hidden_size))
        for name, kind, size in pairs:
            if kind not in KINDS:
                raise ExportError(f"blocks: {name} {kind!r} is none of {', '.join(KINDS)}")
            if (size < 1) if kind == "full" else size:
                raise ExportError(f"blocks: size {size} does not suit {name} {kind}")


class Blocks(Struct, frozen=True):
    """All layers, in order."""

    layers: tuple[Block, ...]

    def first_groups(self) -> int:
        """Key/value heads of the first layer with attention; 0 when none has."""
        return next((block.num_query_groups for block in self.layers if block.attention == "full"), 0)

    def first_ffn_size(self) -> int:
        """Size of the first MLP; 0 when there is none."""
        return next((block.ffn_hidden_size for block in self.layers if block.mlp == "full"), 0)


def blocks_from_json(text: str, *, num_attention_heads: int, hidden_size: int, default: Block) -> Blocks:
    """The ``block_configs`` of a configuration in JSON; `default` has the sizes of blocks that name none.

    Raises:
        ExportError: not JSON, or not such a configuration.
    """
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ExportError(f"blocks: not valid JSON: {error}") from None
    entries = content.get("block_configs") if isinstance(content, Mapping) else content
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ExportError("blocks: there is no list of block_configs")
    return Blocks(tuple(_block(entry, num_attention_heads, hidden_size, default) for entry in entries))


def _block(entry: object, heads: int, hidden: int, default: Block) -> Block:
    attention = _part(entry, "attention")
    mlp = _part(entry, "ffn", "mlp")
    kinds = (_kind(attention), _kind(mlp))
    groups, size = _groups(attention, heads), _ffn_size(mlp, hidden)
    return Block(
        kinds[0],
        (groups or default.num_query_groups) if kinds[0] == "full" else 0,
        kinds[1],
        (size or default.ffn_hidden_size) if kinds[1] == "full" else 0,
    )


def _part(entry: object, *names: str) -> Mapping[str, object]:
    if isinstance(entry, Mapping):
        for name in names:
            if isinstance(entry.get(name), Mapping):
                return cast(Mapping[str, object], entry[name])
    raise ExportError(f"blocks: an entry has no {' or '.join(names)}")


_OTHERS = ("sparsify", "window_length", "num_sink_tokens", "mamba", "llama4", "moe")


def _kind(part: Mapping[str, object]) -> Kind:
    set_ones = [name for name in _OTHERS if part.get(name)]
    if set_ones:
        raise ExportError(f"blocks: no target computes {', '.join(set_ones)} in a block")
    if part.get("no_op"):
        return "no_op"
    return "linear" if part.get("replace_with_linear") else "full"


def _groups(attention: Mapping[str, object], heads: int) -> int:
    if "num_query_groups" in attention:
        return _integer(attention, "num_query_groups")
    per_group = _integer(attention, "n_heads_in_group")
    if per_group and heads % per_group:
        raise ExportError(f"blocks: {heads} attention heads are no multiple of n_heads_in_group {per_group}")
    return heads // per_group if per_group else 0


def _ffn_size(mlp: Mapping[str, object], hidden: int) -> int:
    for name in ("ffn_hidden_size", "intermediate_size"):
        if name in mlp:
            return _integer(mlp, name)
    value = mlp.get("ffn_mult")
    if value is not None and not isinstance(value, int | float):
        raise ExportError(f"blocks: ffn_mult is {value!r}, not a number")
    return ffn_size_of(float(value), hidden) if value else 0


def ffn_size_of(multiple: float, hidden: int) -> int:
    """Two thirds of a multiple of the hidden size, up to a multiple of 256 (`ffn_mult_to_intermediate_size`)."""
    return -(-int(2 * multiple * hidden / 3) // 256) * 256


def _integer(part: Mapping[str, object], name: str) -> int:
    value = part.get(name)
    if value is None:
        return 0
    if isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        return int(value)
    raise ExportError(f"blocks: {name} is {value!r}, not an integer")
