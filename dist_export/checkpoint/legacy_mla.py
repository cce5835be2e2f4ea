"""The down projections of multi-latent attention in legacy files (megatron/core/transformer/multi_latent_attention.py).

The TransformerEngine spec gives every tp rank all of them, the local spec a part of their rows; which it was, only
their size tells. From 0.17 on both may be one module (``FusedMLASelfAttention``), whose rows on a rank are those of q,
then those of k and v; a distributed checkpoint has them apart either way (its ``sharded_state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from dist_export.checkpoint.legacy_layout import argument
from dist_export.checkpoint.legacy_names import Split
from dist_export.checkpoint.legacy_shards import Shard
from dist_export.errors import ExportError

_DOWN = re.compile(r"\.linear_(q|kv|qkv)_down_proj\.weight$")
_FUSED = ".linear_qkv_down_proj."
_FUSED_NORM = re.compile(r"self_attention\.linear_qkv_down_proj\.layer_norm_")
_SIZES = {"q": ("q_lora_rank",), "kv": ("kv_lora_rank", "qk_pos_emb_head_dim")}
_SIZES["qkv"] = (*_SIZES["q"], *_SIZES["kv"])

Arguments = Mapping[str, object] | None


def unfused(name: str, shard: Shard, arguments: Arguments, tp: int, *, where: str) -> Iterator[tuple[str, Shard]]:
    """The tensor under the names of the unfused module: q and kv apart, the fused norm as that of the layer's input.

    Raises `ExportError` when the saved arguments do not say where the rows of q end.
    """
    name = _FUSED_NORM.sub("input_layernorm.", name)
    if not name.endswith(_FUSED + "weight") or not shard.shape:
        yield name, shard
        return
    q_rows, total = _rows("q", arguments), _rows("qkv", arguments)
    if q_rows is None or total is None:
        raise ExportError(f"{where}: {name}: no saved arguments say how many of its rows are q_lora_rank's")
    split = down_projection_split(name, shard, arguments, tp, where=where)
    parts = 1 if split is Split.REPLICATED else tp
    end = q_rows // parts
    yield name.replace(_FUSED, ".linear_q_down_proj."), shard.narrow(0, 0, end)
    yield name.replace(_FUSED, ".linear_kv_down_proj."), shard.narrow(0, end, shard.shape[0] - end)


def down_projection_split(name: str, shard: Shard, arguments: Arguments, tp: int, *, where: str) -> Split | None:
    """How tp ranks share a down projection; None for other tensors, and without saved sizes."""
    match = _DOWN.search(name)
    total = _rows(match[1], arguments) if match else None
    if total is None or not shard.shape:
        return None
    rows = shard.shape[0]
    if rows == total:
        return Split.REPLICATED
    if rows * tp == total:
        return Split.ROWS
    raise ExportError(f"{where}: {name} has {rows} rows on a rank of tp {tp}, expected {total} or {total}/{tp}")


def _rows(kind: str, arguments: Arguments) -> int | None:
    sizes = [argument(arguments, size) for size in _SIZES[kind]]
    return None if None in sizes else sum(size for size in sizes if size is not None)
