"""Reading a live model: this rank's own memory, and parts of other ranks' memory that it has received."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msgspec import Struct
from msgspec.structs import replace

from dist_export.checkpoint.index import Chunk
from dist_export.convert.sources import SourceFiles, SourceRectangle
from dist_export.errors import ExportError
from dist_export.live.memory import RankMemory
from dist_export.live.table import LiveTable
from dist_export.plan.work import Rectangle
from dist_export.tensors.boxes import Box, Shape
from dist_export.tensors.dtypes import DType
from dist_export.tensors.views import Slab

_OWN = -1
"""The file number of this rank's memory; those of received parts count up from 0."""


class Part(Struct, frozen=True):
    """A rectangle of a chunk, in the coordinates of the slab."""

    slab: Slab
    file: int
    offset: int
    """Which chunk: its place in the index."""
    rectangle: Rectangle


class MemorySources(SourceFiles):
    """`SourceFiles` over the memory of one rank. What it lacks must be `hold`-en before it is read.

    With `partial` what it lacks is left out of the rectangles instead: for sums and maxima over all ranks.
    """

    def __init__(self, table: LiveTable, rank: int, memory: RankMemory, *, partial: bool = False) -> None:
        super().__init__(table.index)
        self.table, self.rank, self.memory, self.partial = table, rank, memory, partial
        self._held: dict[tuple[Slab, int, int], list[tuple[Rectangle, int]]] = {}
        self._parts: list[torch.Tensor] = []

    def hold(self, part: Part, packed: torch.Tensor) -> None:
        """Keep a received rectangle: its elements row by row as bytes (uint8, on any device)."""
        self._held.setdefault((part.slab, part.file, part.offset), []).append((part.rectangle, len(self._parts)))
        self._parts.append(packed)

    def release(self) -> None:
        """Give up everything received."""
        self._held.clear()
        self._parts.clear()

    def own_offset(self, chunk: Chunk) -> int | None:
        """Where a chunk begins in this rank's memory; None where it is not there."""
        rank, address = self.table.place_for(chunk, self.rank)
        return address if rank == self.rank else None

    def rectangles(
        self, slab: Slab, shape: Shape, dtype: DType, *, needed: Sequence[Rectangle] | None = None
    ) -> list[SourceRectangle]:
        """As `SourceFiles.rectangles`, in this rank's memory and among what it has received."""
        found: list[SourceRectangle] = []
        for chunk, common in self.chunks_of(slab, shape, needed):
            found += self._of_chunk(slab, chunk, common, dtype)
        return sorted(found, key=lambda r: (r.rows, r.columns))

    def _of_chunk(self, slab: Slab, chunk: Chunk, common: Box, dtype: DType) -> list[SourceRectangle]:
        own = self.own_offset(chunk)
        whole = self.rectangle(slab, chunk, common, dtype)
        if own is not None:
            return [replace(whole, file=_OWN, offset=whole.offset - chunk.offset + own)]
        if self.partial:
            return []
        return [
            SourceRectangle(number, (top, bottom), (left, right), 0, (right - left) * dtype.itemsize, dtype.itemsize)
            for (top, bottom, left, right), number in self._held.get((slab, chunk.file, chunk.offset), ())
        ]

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of this rank's memory or of a received part."""
        if file == _OWN:
            self.memory.read_into(offset, buffer)
        else:
            part = self._parts[file][offset : offset + buffer.nbytes]
            if part.numel() != buffer.nbytes:
                raise ExportError(f"{self.index.origin}: a part that rank {self.rank} received is too short")
            torch.frombuffer(buffer, dtype=torch.uint8).copy_(part)
        with self._lock:
            self.num_bytes_read += buffer.nbytes
