"""What a rank holds, as ``model.state_dict()`` has it: layers and experts numbered within the rank, no global shapes.

Names tell how tp ranks share a tensor, as they do in legacy checkpoints (`dist_export.checkpoint.legacy`), and ranks
say where they stand. `sharded_state` needs no such knowledge and reads every layout; prefer it where there is a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from dist_export.checkpoint.ignored import ignored_reason
from dist_export.checkpoint.legacy import index_of_ranks
from dist_export.checkpoint.legacy_files import RankFile, RankState, Unused
from dist_export.checkpoint.legacy_shards import Shard
from dist_export.checkpoint.quantizer_names import quantizer_tensor
from dist_export.errors import ExportError, Faults
from dist_export.live.memory import RankMemory, check_tensor, dtype_name, object_entries
from dist_export.live.table import ORIGIN, Holdings, LiveTable, ObjectEntry, ShardEntry
from dist_export.tensors.boxes import Shape, row_major_strides
from dist_export.tensors.dtypes import dtype_by_name

_STACKED = re.compile(r"(^|\.)decoder\.layers\.(?!\d)")
_VERSION = 3.0  # order of the rows of linear_qkv in every Megatron-Core model


class Held(Struct, frozen=True):
    """A tensor in a rank's memory."""

    dtype: str
    shape: Shape
    address: int  # bytes


class PlainHoldings(Struct, frozen=True):
    """What a rank says about itself: small, for all other ranks."""

    tp: int = 0
    pp: int = 0
    ep: int = 0
    """Ranks within the training layout."""
    chunks: tuple[Mapping[str, Held], ...] = ()
    """Per virtual pipeline stage: name in the state dict -> tensor."""
    objects: tuple[Mapping[str, Held], ...] = field(default=())


def is_stacked(state: Mapping[str, Any]) -> bool:
    """Whether layers are stacked in dim 0 of their tensors, under names without numbers."""
    return any(_STACKED.search(name) for name in state)


def collect_stacked(state: Mapping[str, Any]) -> tuple[RankMemory, Holdings]:
    """A whole model with stacked layers, under the names of a ``torch_dist`` checkpoint. For `make_table`."""
    memory = RankMemory()
    entries: list[ShardEntry] = []
    objects: list[ObjectEntry] = []
    for name, value in state.items():
        if "_extra_state" in name:
            objects += object_entries(name, value, memory)
            continue
        tensor = check_tensor(name, value)
        shape = tuple(tensor.shape)
        num_bytes = tensor.numel() * tensor.element_size()
        start = (0,) * len(shape)
        entries.append(ShardEntry(name, shape, dtype_name(tensor), start, shape, memory.add(tensor), num_bytes))
    return memory, Holdings(tuple(entries), tuple(objects))


def collect(
    states: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, tp: int = 0, pp: int = 0, ep: int = 0
) -> tuple[RankMemory, PlainHoldings]:
    """This rank's memory and what `make_plain_table` must know of it.

    `states` is ``model.state_dict()``, or one per virtual pipeline stage; `tp`, `pp`, `ep` are this rank's.
    Raises `ExportError` naming what is no tensor.
    """
    memory, chunks, objects = RankMemory(), [], []
    faults = Faults("state dict of a live model")
    for state in [states] if isinstance(states, Mapping) else states:
        held: dict[str, Held] = {}
        extra: dict[str, Held] = {}
        for name, value in state.items():
            try:
                _collect_one(name, value, memory, held, extra)
            except ExportError as error:
                faults.add(str(error))
        chunks.append(held)
        objects.append(extra)
    faults.raise_if_any()
    return memory, PlainHoldings(tp, pp, ep, tuple(chunks), tuple(objects))


def _collect_one(name: str, value: Any, memory: RankMemory, held: dict[str, Held], extra: dict[str, Held]) -> None:
    if name.rpartition(".")[2] == "_extra_state":
        for each in object_entries(name, value, memory):
            extra[name] = Held("uint8", (each.num_bytes,), each.address)
        return
    if ignored_reason(name):
        return
    if quantizer_tensor(name) is not None:
        raise ExportError(
            f"{name} is of a quantiser: give the model's sharded_state_dict(), which tells how ranks share it"
        )
    tensor = check_tensor(name, value)
    held[name] = Held(dtype_name(tensor), tuple(tensor.shape), memory.add(tensor))


def make_plain_table(holdings: Sequence[PlainHoldings], arguments: Mapping[str, object]) -> LiveTable:
    """The table of what every rank holds, in order of ranks. Pure: the same on every rank.

    `arguments` hold the sizes of the layout under Megatron's names (``tensor_model_parallel_size`` …). Ranks with equal
    tp, pp and ep rank are replicas. Raises `ExportError` for ranks that are missing or do not fit together.
    """
    replicas: dict[tuple[int, int, int], list[int]] = {}
    for rank, held in enumerate(holdings):
        replicas.setdefault((held.tp, held.pp, held.ep), []).append(rank)
    faults = Faults(f"{ORIGIN}: data-parallel replicas hold different tensors")
    for ranks in replicas.values():
        for other in ranks[1:]:
            if holdings[other].chunks != holdings[ranks[0]].chunks:
                faults.add(f"ranks {ranks[0]} and {other}")
    faults.raise_if_any()
    files = [RankFile(f"rank{ranks[0]}", tp, (pp, ep)) for (tp, pp, ep), ranks in replicas.items()]
    states = [_rank_state(n, holdings[ranks[0]], ranks[0], arguments) for n, ranks in enumerate(replicas.values())]
    builder = index_of_ranks(ORIGIN, files, states)
    return LiveTable(builder.build(), tuple(map(tuple, replicas.values())))


def _rank_state(number: int, held: PlainHoldings, rank: int, arguments: Mapping[str, object]) -> RankState:
    return RankState(
        path=Path(f"rank{rank}") / "state_dict",
        chunks=tuple({name: _shard(number, each) for name, each in chunk.items()} for chunk in held.chunks),
        objects=tuple({name: _shard(number, each) for name, each in chunk.items()} for chunk in held.objects),
        arguments=arguments,
        iteration=None,
        version=_VERSION,
        unused=Unused(),
    )


def _shard(file: int, held: Held) -> Shard:
    itemsize = dtype_by_name(held.dtype).itemsize
    strides = tuple(step * itemsize for step in row_major_strides(held.shape))
    return Shard(file, held.dtype, held.shape, held.address, strides)
