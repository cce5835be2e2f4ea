"""Live models as sources: the chunk table of tensors in the memory of one process or of many.

A checkpoint on disk is a table of chunks in files; a live model is a table of chunks in the memory of ranks. Everything
above the table (rules, plans, tiles) is the same for both. How the parts fit, each usable alone:

1. *What a rank holds*: `memory.RankMemory`, its tensors one after another in an address space of their own, and
   `table.ShardEntry`, plain values that say which box of which global tensor begins at which address.
   `sharded_state.collect` makes both out of Megatron's ``sharded_state_dict()`` (any layout), `plain_state.collect` out
   of ``state_dict()``.
2. *The table*: ``table.make_table(entries of every rank)`` is a `LiveTable`: a `CheckpointIndex` whose file number n is
   rank n's memory, and which other ranks hold the same chunk. Entries are small: gather them (`torch.distributed`'s
   ``all_gather_object``) and every rank makes the same table.
3. *The model*: ``model.open_live(table, arguments)`` is an `OpenedModel` as `dist_export.api.open_model` gives it, so
   ``api.plan(model, options)`` plans any target; ``configuration.arguments_of(transformer_config, …)`` gives arguments.
4. *Bytes*: `sources.MemorySources` is a `SourceFiles` over this rank's own memory and over what it has received;
   `exchange` says which rectangles a receiver lacks (`parcels`, from the plan alone, so senders and receivers agree
   without a word) and moves them, packed, between ranks (`exchange`). `outputs.MemoryFile` takes the target bytes.
5. *Together*: `run.LiveExport` makes target shards in memory, round by round.
6. *For callers*: `iterate` and `buckets` yield a model's weights under a target's names, a bucket in memory at a time.

Megatron is imported only to ask for a rank's place in the layout. torch is imported by every module but `table` and
`configuration`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_export.live.streaming import buckets, iterate

__all__ = ["buckets", "iterate"]


def __getattr__(name: str) -> Any:
    """`iterate` and `buckets`, imported when they are asked for: they need torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from dist_export.live import streaming

    return getattr(streaming, name)
