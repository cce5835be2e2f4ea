"""Target files of a live model made in memory, in rounds: what a round needs is exchanged, converted and given up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dist_export.convert.execute import Budget, Executor
from dist_export.convert.scale_table import Float32, ScaleTable, entries_of, find, table_of
from dist_export.convert.torch_arithmetic import TorchArithmetic
from dist_export.convert.view_reader import ViewReader
from dist_export.live.exchange import exchange, needs_of, parcels
from dist_export.live.memory import RankMemory
from dist_export.live.outputs import MemoryFile
from dist_export.live.sources import MemorySources
from dist_export.live.table import LiveTable, check_same
from dist_export.plan.export import ExportPlan, validate
from dist_export.plan.shard import PlannedTensor, ShardPlan
from dist_export.plan.work import Fill, SlabUses, WorkItem, collect_uses

ROUND_BYTES = 256 << 20
"""Of target tensors that a rank makes in one round, which bounds what it receives meanwhile."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The processes that hold the model, and how they talk. One process needs no torch.distributed."""

    rank: int = 0
    world_size: int = 1
    group: Any = None
    """A torch.distributed process group; None: all processes."""
    device: Any = "cpu"
    """Where messages live: a CUDA device with NCCL."""

    @classmethod
    def of_group(cls, group: Any = None) -> Peers:
        """Those of a process group; a single one where torch.distributed is not initialised."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            return cls()
        on_gpu = "nccl" in str(dist.get_backend(group))
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        return cls(dist.get_rank(group), dist.get_world_size(group), group, device)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small value, in order of ranks. Collective."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_reduce_max(self, values: Float32) -> Float32:
        """The largest of every rank's values, element by element. Collective."""
        if self.world_size == 1:
            return values
        import torch.distributed as dist

        tensor = torch.from_numpy(values).to(self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        result: Float32 = tensor.cpu().numpy()
        return result


@dataclass(slots=True)
class _Share:
    """What one rank makes: planned by every rank, so that senders know it too."""

    shards: dict[int, ShardPlan]
    slabs: list[SlabUses] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    rounds: list[set[tuple[int, int]]] = field(default_factory=list)
    """Keys of the output tensors of each round."""

    def items(self, number: int) -> list[WorkItem]:
        keys = self.rounds[number] if number < len(self.rounds) else set()
        chosen = ((slab, [use for use in slab.uses if use.output.key in keys]) for slab in self.slabs)
        return [slab.item(uses) for slab, uses in chosen if uses]

    def fills_of(self, number: int) -> list[Fill]:
        keys = self.rounds[number] if number < len(self.rounds) else set()
        return [fill for fill in self.fills if fill.output.key in keys]

    def outputs(self, number: int) -> Iterator[PlannedTensor]:
        for file, index in sorted(self.rounds[number]) if number < len(self.rounds) else ():
            yield self.shards[file].tensors[index]


class LiveExport:
    """Makes files of one plan out of a live model. Every rank has its own, made with the same plan and table."""

    def __init__(
        self, plan: ExportPlan, table: LiveTable, memory: RankMemory, peers: Peers, *, round_bytes: int = ROUND_BYTES
    ) -> None:
        self.plan, self.table, self.memory, self.peers = plan, table, memory, peers
        self.round_bytes = round_bytes
        self.num_bytes_received = 0
        self.most_bytes_received = 0
        """In one round."""

    def tensors(self, files: Sequence[Sequence[int]]) -> dict[int, dict[str, torch.Tensor]]:
        """This rank's files as name -> tensor on the CPU. Collective.

        `files` are the numbers of every rank's files (for TensorRT-LLM: target ranks), the same on every rank.
        Raises `ExportError` for whatever the plan or the values forbid.
        """
        validate(self.plan)
        check_same(self.peers.gather(self.plan.digest()))
        shares = {rank: self._share(numbers) for rank, numbers in enumerate(files)}
        own = shares[self.peers.rank]
        outputs = {number: MemoryFile(shard) for number, shard in own.shards.items()}
        scales = self._scales()
        sources = MemorySources(self.table, self.peers.rank, self.memory)
        for number in range(max(len(share.rounds) for share in shares.values())):
            self._exchange(shares, number, sources)
            self._executor(sources, outputs, scales).run(own.items(number), own.fills_of(number))
            sources.release()
        return {number: output.tensors() for number, output in outputs.items()}

    def _share(self, numbers: Sequence[int]) -> _Share:
        share = _Share({number: self.plan.shard(number) for number in numbers})
        catalog = self.plan.catalog
        share.slabs, share.fills = collect_uses(share.shards, catalog.tensors, updates=catalog.updates)
        size = self.round_bytes
        for number, shard in share.shards.items():
            for index, planned in enumerate(shard.tensors):
                size += planned.num_bytes
                if size > self.round_bytes:
                    share.rounds.append(set())
                    size = planned.num_bytes
                share.rounds[-1].add((number, index))
        return share

    def _exchange(self, shares: Mapping[int, _Share], number: int, sources: MemorySources) -> None:
        if self.peers.world_size == 1:
            return
        index = self.table.index
        needed = {
            rank: parcels(self.table, needs_of(share.items(number), share.outputs(number), index), rank)
            for rank, share in shares.items()
        }
        received = exchange(
            needed, self.memory, self.peers.rank, group=self.peers.group, device=self.peers.device
        )
        num_bytes = 0
        for part, packed in received:
            num_bytes += packed.numel()
            sources.hold(part, packed.cpu())
        self.num_bytes_received += num_bytes
        self.most_bytes_received = max(self.most_bytes_received, num_bytes)

    def _executor(
        self, sources: MemorySources, outputs: Mapping[int, MemoryFile], scales: ScaleTable | None
    ) -> Executor:
        executor = Executor(sources, outputs, budget=Budget(), observer=_Silent())
        executor.converter = TorchArithmetic()
        executor.reader = ViewReader(sources, self.table.index.shapes(), self.plan.catalog.updates)
        if scales is not None:
            from dist_export.convert.encode import Encoder

            measured = ViewReader(sources, self.table.index.shapes(), self.plan.catalog.updates, scales.rows)
            executor.encoder = Encoder(scales, measured)
        return executor

    def _scales(self) -> ScaleTable | None:
        """The scale table: every rank measures what it holds, one MAX all-reduce makes it everybody's. Collective."""
        quantization = self.plan.quantization
        if quantization is None:
            return None
        entries = entries_of(quantization)
        index = self.table.index
        sources = MemorySources(self.table, self.peers.rank, self.memory, partial=True)
        here = []
        for number, entry in enumerate(entries):
            chunks = index.chunks(entry.stored.slab.name) if entry.stored else []
            if all(sources.own_offset(chunk) is not None for chunk in chunks):
                here.append(number)
        values = find(entries, here, ViewReader(sources, index.shapes(), self.plan.catalog.updates))
        # MAX over ranks must not lose what is not a number: an infinite amax is refused as well.
        values = np.where(np.isnan(values), np.float32(np.inf), values)
        return table_of(entries, self.peers.all_reduce_max(values), quantization)


class _Silent:
    """Nobody watches the progress."""

    def progress(self, num_bytes_read: int, num_bytes_written: int) -> None:
        """Does nothing."""
