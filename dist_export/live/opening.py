"""From the states of all ranks to their table: what every way of exporting a live model begins with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.live import plain_state, sharded_state
from dist_export.live.configuration import layout_arguments
from dist_export.live.memory import RankMemory, read_objects
from dist_export.live.run import Peers
from dist_export.live.table import LiveTable, make_table

States = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A state dict, or one per virtual pipeline stage."""


class Ranks(Struct, frozen=True):
    """Where this process stands in the training layout, and the sizes of that."""

    tp: int = 0
    pp: int = 0
    ep: int = 0
    tp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    expert_tp_size: int = 1

    @classmethod
    def of_megatron(cls) -> Ranks:
        """As megatron.core.parallel_state says. Raises `ExportError` before it is initialised."""
        from megatron.core import parallel_state as state

        if not state.model_parallel_is_initialized():
            raise ExportError("megatron.core.parallel_state is not initialised: call initialize_model_parallel first")
        return cls(
            state.get_tensor_model_parallel_rank(),
            state.get_pipeline_model_parallel_rank(),
            state.get_expert_model_parallel_rank(),
            state.get_tensor_model_parallel_world_size(),
            state.get_pipeline_model_parallel_world_size(),
            state.get_expert_model_parallel_world_size(),
            state.get_expert_tensor_parallel_world_size(),
        )

    def arguments(self) -> dict[str, object]:
        """The sizes under Megatron's names."""
        return layout_arguments(tp=self.tp_size, pp=self.pp_size, ep=self.ep_size, expert_tp=self.expert_tp_size)


def is_sharded(chunks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether they are what ``sharded_state_dict()`` returns, one per virtual stage."""
    return any(hasattr(value, "global_offset") or hasattr(value, "build_fn") for c in chunks for value in c.values())


def table_of(
    chunks: Sequence[Mapping[str, Any]], arguments: Mapping[str, object], ranks: Ranks, peers: Peers
) -> tuple[LiveTable, RankMemory, int]:
    """The table, this rank's memory, and the number of its first layer in plain states. Collective.

    `chunks` are this rank's states, one per virtual pipeline stage. Raises `ExportError` for what is no model.
    """
    if is_sharded(chunks):
        memory, holdings = sharded_state.collect(chunks)
        return make_table(peers.gather(holdings)), memory, 0
    if any(map(plain_state.is_stacked, chunks)):
        if peers.world_size > 1 or len(chunks) > 1:
            raise ExportError("layers are stacked in one tensor: give the whole model so, in one process")
        memory, holdings = plain_state.collect_stacked(chunks[0])
        return make_table([holdings]), memory, 0
    memory, plain = plain_state.collect(chunks, tp=ranks.tp, pp=ranks.pp, ep=ranks.ep)
    gathered = peers.gather(plain)
    earlier = {each.pp: _num_layers(each.chunks[0]) for each in gathered if each.pp < ranks.pp}
    return plain_state.make_plain_table(gathered, arguments), memory, sum(earlier.values())


def _num_layers(names: Mapping[str, object]) -> int:
    return len({match[1] for name in names if (match := re.search(r"decoder\.layers\.(\d+)\.", name))})


def gathered_objects(table: LiveTable, memory: RankMemory, peers: Peers) -> dict[str, bytes]:
    """The bytes of every object of the table. Collective."""
    if not table.index.objects:
        return {}
    own = {file for file, ranks in enumerate(table.ranks) if ranks[0] == peers.rank}
    parts = peers.gather(read_objects(table.index.objects, own, memory))
    return {name: data for part in parts for name, data in part.items()}
