"""The chunk table of a live model: which rank's memory holds which boxes of which tensors. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, field

from dist_export.checkpoint.ignored import ignored_reason
from dist_export.checkpoint.index import CheckpointIndex, Chunk, ObjectRecord, without_wrapper_prefix
from dist_export.checkpoint.index_builder import IndexBuilder
from dist_export.errors import ExportError, Faults
from dist_export.tensors.boxes import Box, Shape

ORIGIN = Path("live model")
"""What stands in messages where a checkpoint has its folder."""
FORMAT = "live"

Place = tuple[int, int]
"""(rank, address in its memory)."""


class ShardEntry(Struct, frozen=True):
    """A box of a global tensor in a rank's memory, row-major."""

    name: str
    """Global name, as a ``torch_dist`` checkpoint has it."""
    shape: Shape
    """Of the whole tensor."""
    dtype: str
    start: Shape
    size: Shape
    address: int  # bytes
    num_bytes: int


class ObjectEntry(Struct, frozen=True):
    """The bytes of what a layer saved beside weights (``_extra_state``), in a rank's memory."""

    name: str
    """As a ``torch_dist`` checkpoint has it: ``….linear_qkv._extra_state/shard_3_8``."""
    address: int  # bytes
    num_bytes: int


class Holdings(Struct, frozen=True):
    """What a rank says about itself: small, for all other ranks."""

    entries: tuple[ShardEntry, ...] = ()
    objects: tuple[ObjectEntry, ...] = ()


class LiveTable(Struct, frozen=True):
    """A chunk table and where its chunks are."""

    index: CheckpointIndex
    """Each file is the memory of a rank, and offsets are addresses in it."""
    ranks: tuple[tuple[int, ...], ...]
    """File number -> the ranks whose memory is just like it: that rank first, then its replicas."""
    copies: Mapping[tuple[int, int], tuple[Place, ...]] = field(default_factory=dict)
    """(file, offset) of a chunk -> where else it is."""

    def places(self, chunk: Chunk) -> tuple[Place, ...]:
        """Everywhere a chunk is."""
        own = tuple((rank, chunk.offset) for rank in self.ranks[chunk.file])
        return own + self.copies.get((chunk.file, chunk.offset), ())

    def place_for(self, chunk: Chunk, receiver: int) -> Place:
        """Where `receiver` takes a chunk from: its own memory if it can; else replicas share the work."""
        places = self.places(chunk)
        own = next((place for place in places if place[0] == receiver), None)
        return own or places[receiver % len(places)]


def make_table(holdings: Sequence[Holdings]) -> LiveTable:
    """The table of what every rank holds, in order of ranks. Pure: the same on every rank.

    Raises `ExportError` for ranks that disagree about a tensor and for boxes that leave gaps.
    """
    builder = IndexBuilder(ORIGIN, FORMAT, chunks_are_records=False)
    found: dict[str, list[tuple[int, ShardEntry]]] = {}
    for rank, held in enumerate(holdings):
        builder.file(f"rank{rank}")
        for each in held.objects:
            builder.objects.setdefault(each.name, ObjectRecord(rank, each.address, each.num_bytes))
        for entry in held.entries:
            name = without_wrapper_prefix(entry.name)
            reason = ignored_reason(name)
            if reason:
                builder.ignore(reason, num_bytes=entry.num_bytes)
            else:
                found.setdefault(name, []).append((rank, entry))
    copies: dict[tuple[int, int], tuple[Place, ...]] = {}
    faults = Faults(f"{ORIGIN}: ranks hold different models")
    for name, held_by in found.items():
        _add(builder, name, held_by, copies, faults)
    faults.raise_if_any()
    return LiveTable(builder.build(), tuple((rank,) for rank in range(len(holdings))), copies)


def _add(
    builder: IndexBuilder,
    name: str,
    held: Sequence[tuple[int, ShardEntry]],
    copies: dict[tuple[int, int], tuple[Place, ...]],
    faults: Faults,
) -> None:
    first_rank, first = held[0]
    by_box: dict[tuple[Shape, Shape], list[tuple[int, ShardEntry]]] = {}
    for rank, entry in held:
        if (entry.shape, entry.dtype) != (first.shape, first.dtype):
            faults.add(
                f"{name}: rank {rank} says {entry.dtype} {list(entry.shape)}, rank {first_rank} "
                f"{first.dtype} {list(first.shape)}"
            )
            return
        by_box.setdefault((entry.start, entry.size), []).append((rank, entry))
    chunks = []
    for (start, size), places in by_box.items():
        rank, entry = places[0]
        chunks.append(Chunk(Box(start, size), rank, entry.address, entry.num_bytes))
        if len(places) > 1:
            copies[rank, entry.address] = tuple((other, each.address) for other, each in places[1:])
    builder.add(name, first.shape, first.dtype, chunks)


def check_same(tables: Iterable[str]) -> None:
    """Raise `ExportError` unless the digests of all ranks' plans are equal."""
    different = sorted(set(tables))
    if len(different) > 1:
        raise ExportError(f"ranks plan the export of the {ORIGIN} differently: were they given the same options?")
