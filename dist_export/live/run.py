"""Target files of a live model made in memory, in rounds: what a round needs is exchanged, converted and given up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from msgspec import Struct, field

from dist_export.convert.execute import Budget, Executor
from dist_export.convert.outputs import WritableFile
from dist_export.convert.scale_table import Float32, ScaleTable, entries_of, find, measure, table_of
from dist_export.convert.torch_arithmetic import TorchArithmetic
from dist_export.convert.view_reader import ViewReader
from dist_export.errors import ExportError, Faults
from dist_export.live.exchange import exchange, needs_of, parcels
from dist_export.live.memory import RankMemory
from dist_export.live.outputs import MemoryFile, RoundFile
from dist_export.live.sources import MemorySources
from dist_export.live.table import ORIGIN, LiveTable, check_same
from dist_export.plan.export import ExportPlan, validate
from dist_export.plan.shard import PlannedTensor, ShardPlan
from dist_export.plan.work import Fill, SlabUses, Use, WorkItem, collect_uses

ROUND_BYTES = 256 << 20
"""Of target tensors that a rank makes in one round, which bounds what it receives meanwhile."""

Bucket = list[tuple[str, torch.Tensor]]
"""Tensors by name, each with memory of its own."""
Key = tuple[int, int]
"""(file, number of the tensor in it)."""


class Peers(Struct, frozen=True):
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


class _Share(Struct):
    """What one rank makes: planned by every rank, so that senders know it too."""

    shards: Mapping[int, ShardPlan]
    rounds: list[list[Key]] = field(default_factory=list)
    """Keys of the output tensors of each round, in order."""
    work: list[list[tuple[SlabUses, list[Use]]]] = field(default_factory=list)
    fills: list[list[Fill]] = field(default_factory=list)
    """As `work`, by round."""

    def assign(self, slabs: Iterable[SlabUses], fills: Iterable[Fill]) -> None:
        """Give every use and every fill to the round of its output."""
        round_of = {key: number for number, keys in enumerate(self.rounds) for key in keys}
        self.work, self.fills = [[] for _ in self.rounds], [[] for _ in self.rounds]
        for slab in slabs:
            found: dict[int, list[Use]] = {}
            for use in slab.uses:
                found.setdefault(round_of[use.output.key], []).append(use)
            for number, uses in found.items():
                self.work[number].append((slab, uses))
        for fill in fills:
            self.fills[round_of[fill.output.key]].append(fill)

    def items(self, number: int) -> list[WorkItem]:
        return [slab.item(uses) for slab, uses in self.work[number]] if number < len(self.rounds) else []

    def fills_of(self, number: int) -> list[Fill]:
        return self.fills[number] if number < len(self.rounds) else []

    def outputs(self, number: int) -> Iterator[PlannedTensor]:
        for file, index in self.rounds[number] if number < len(self.rounds) else ():
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
        self.most_bucket_bytes = 0
        """Of target tensors in one round of `buckets`."""

    def tensors(self, files: Sequence[Sequence[int]]) -> dict[int, dict[str, torch.Tensor]]:
        """This rank's files as name -> tensor on the CPU. Collective.

        `files` are the numbers of every rank's files (for TensorRT-LLM: target ranks), the same on every rank.
        Raises `ExportError` for whatever the plan or the values forbid.
        """
        shares = self._shares(files)
        own = shares[self.peers.rank]
        outputs = {number: MemoryFile(shard) for number, shard in own.shards.items()}
        scales = self._scales()
        sources = MemorySources(self.table, self.peers.rank, self.memory)
        for number in range(max(len(share.rounds) for share in shares)):
            self._exchange(shares, number, sources)
            self._executor(sources, outputs, scales).run(own.items(number), own.fills_of(number))
            sources.release()
        return {number: output.tensors() for number, output in outputs.items()}

    def buckets(self, files: Sequence[Sequence[int]]) -> Iterator[Bucket]:
        """This rank's files as lists of (name, tensor on the CPU): what a round makes, in the order of the model.

        Plans and measures at once, collectively; the iterator is collective, too. Memory is that of a round: at most
        `round_bytes` of target tensors (or one tensor larger than that), and what is received and sent for them. Ranks
        with more to make than others go on with empty hands: those yield nothing meanwhile.
        A rank that closes its iterator early, or fails, makes the others raise `ExportError` at their next round.
        """
        shares = self._shares(files, in_order=True)
        return self._stream(shares, self._scales())

    def _stream(self, shares: Sequence[_Share], scales: ScaleTable | None) -> Iterator[Bucket]:
        own, count = shares[self.peers.rank], max(len(share.rounds) for share in shares)
        sources = MemorySources(self.table, self.peers.rank, self.memory)
        for number in range(count):
            self._agree_to_go_on(stopped=False)
            self._exchange(shares, number, sources)
            try:
                if number < len(own.rounds):
                    yield self._bucket(own, number, sources, scales)
            except BaseException:  # closed by the caller, or failed: others are waiting in the next round
                if number + 1 < count:
                    self._agree_to_go_on(stopped=True)
                raise

    def _bucket(self, own: _Share, number: int, sources: MemorySources, scales: ScaleTable | None) -> Bucket:
        keys = own.rounds[number]
        numbers = sorted({file for file, _ in keys})
        outputs = {n: RoundFile(own.shards[n], [index for file, index in keys if file == n]) for n in numbers}
        self._executor(sources, outputs, scales).run(own.items(number), own.fills_of(number))
        sources.release()
        bucket = [outputs[file].tensor(index) for file, index in keys]
        self.most_bucket_bytes = max(self.most_bucket_bytes, sum(output.num_bytes for output in outputs.values()))
        return bucket

    def _agree_to_go_on(self, *, stopped: bool) -> None:
        """Collective. Raises `ExportError` on the ranks that have not stopped when another has."""
        gone = [rank for rank, each in enumerate(self.peers.gather(stopped)) if each]
        if gone and not stopped:
            raise ExportError(
                f"{ORIGIN}: rank {', '.join(map(str, gone))} of the group failed, or stopped iterating before the end, "
                "so its tensors are missing here: every rank must take all of its buckets"
            )

    def _shares(self, files: Sequence[Sequence[int]], *, in_order: bool = False) -> list[_Share]:
        """The share of every rank. Collective, and where faults of the plan are found."""
        validate(self.plan)
        self.memory.settle()
        check_same(self.peers.gather(f"{self.plan.digest()} {self.round_bytes}"))
        made = {numbers: self._share(numbers, in_order=in_order) for numbers in {tuple(each) for each in files}}
        return [made[tuple(numbers)] for numbers in files]

    def _share(self, numbers: Sequence[int], *, in_order: bool) -> _Share:
        share = _Share({number: self.plan.shard(number) for number in numbers})
        size = self.round_bytes
        for number, index in self._keys(share, in_order=in_order):
            num_bytes = share.shards[number].tensors[index].num_bytes
            size += num_bytes
            if size > self.round_bytes:
                share.rounds.append([])
                size = num_bytes
            share.rounds[-1].append((number, index))
        catalog = self.plan.catalog
        share.assign(*collect_uses(share.shards, catalog.tensors, updates=catalog.updates))
        return share

    def _keys(self, share: _Share, *, in_order: bool) -> list[Key]:
        keys = [(number, index) for number, shard in share.shards.items() for index in range(len(shard.tensors))]
        if not in_order:
            return keys  # as they lie in the files
        planner, places = self.plan.planner, dict[str, int]()
        for rank in share.shards if self.plan.target == "trtllm" else (0,):
            for planned in planner.tensors(rank, faults=Faults(str(ORIGIN))):  # which `validate` has found to be none
                places.setdefault(planned.name, len(places))
        return sorted(keys, key=lambda key: places[share.shards[key[0]].tensors[key[1]].name])

    def _exchange(self, shares: Sequence[_Share], number: int, sources: MemorySources) -> None:
        if self.peers.world_size == 1:
            return
        index = self.table.index
        needs = {id(share): needs_of(share.items(number), share.outputs(number), index) for share in shares}
        needed = {rank: parcels(self.table, needs[id(share)], rank) for rank, share in enumerate(shares)}
        received = exchange(needed, self.memory, self.peers.rank, group=self.peers.group, device=self.peers.device)
        num_bytes = 0
        for part, packed in received:
            num_bytes += packed.numel()
            sources.hold(part, packed.cpu())
        self.num_bytes_received += num_bytes
        self.most_bytes_received = max(self.most_bytes_received, num_bytes)

    def _executor(
        self, sources: MemorySources, outputs: Mapping[int, WritableFile], scales: ScaleTable | None
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
        reader = ViewReader(sources, index.shapes(), self.plan.catalog.updates)
        here = []
        for number, entry in enumerate(entries):
            chunks = index.chunks(entry.stored.slab.name) if entry.stored else [None]
            if all(chunk is not None and sources.own_offset(chunk) is not None for chunk in chunks):
                here.append(number)
        values, start = find(entries, here, reader), 0
        for entry in entries:
            if entry.stored is None:
                values[start : start + entry.size] = measure(entry, reader)
            start += entry.size
        # MAX over ranks must not lose what is not a number: an infinite amax is refused as well.
        values = np.where(np.isnan(values), np.float32(np.inf), values)
        return table_of(entries, self.peers.all_reduce_max(values), quantization)


class _Silent:
    """Nobody watches the progress."""

    def progress(self, num_bytes_read: int, num_bytes_written: int) -> None:
        """Does nothing."""
