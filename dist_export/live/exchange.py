"""Moving rectangles of live tensors between ranks: only what a receiver needs and does not have.

What moves follows from the table and the plans alone. Every rank can therefore say for every receiver what it takes
from whom, in the same order, and no request is ever sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from msgspec import Struct

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.convert.sources import SourceFiles, SourceRectangle
from dist_export.live.memory import RankMemory
from dist_export.live.sources import Part
from dist_export.live.table import LiveTable
from dist_export.models.quantization import is_row_slab
from dist_export.plan.shard import PlannedTensor
from dist_export.plan.work import Rectangle, WorkItem, flat_rectangle, slab_shape
from dist_export.tensors.boxes import Box, Shape
from dist_export.tensors.dtypes import DType, dtype_by_name
from dist_export.tensors.views import Slab, View


class Parcel(Struct, frozen=True):
    """A rectangle that one rank needs of another's memory."""

    sender: int
    part: Part
    address: int  # of the rectangle's first element in the sender's memory, bytes
    strides: tuple[int, int]  # bytes between rows and between columns there
    itemsize: int

    @property
    def shape(self) -> tuple[int, int]:
        top, bottom, left, right = self.part.rectangle
        return bottom - top, right - left

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.itemsize


class Need(Struct, frozen=True):
    """Rectangles of a source slab that a receiver reads in one round."""

    slab: Slab
    shape: Shape
    """Of the slab."""
    dtype: DType
    rectangles: tuple[Rectangle, ...]


def needs_of(items: Iterable[WorkItem], outputs: Iterable[PlannedTensor], index: CheckpointIndex) -> list[Need]:
    """Everything that is read for `items`, and for `outputs` beside them: what their recipes and permutations take."""
    shapes = index.shapes()
    found: dict[Slab, tuple[Shape, DType, list[Rectangle]]] = {}
    for item in items:
        entry = found.setdefault(item.slab, (item.shape, item.dtype, []))
        entry[2].extend(item.needed(use) for use in item.uses)
    for planned in outputs:
        views = list(_views(planned.recipe)) + ([planned.view] if planned.is_permuted else [])
        for piece in (piece for view in views for piece in view.pieces):
            if piece.slab is None or is_row_slab(piece.slab) or not piece.box.num_elements:
                continue
            shape = slab_shape(piece.slab, shapes)
            size = piece.box.size[len(piece.box.size) - len(shape) :]
            entry = found.setdefault(piece.slab, (shape, dtype_by_name(shapes[piece.slab.name][1]), []))
            entry[2].append(flat_rectangle(Box(piece.source_start, size), shape))
    return [Need(slab, shape, dtype, tuple(needed)) for slab, (shape, dtype, needed) in found.items()]


def _views(recipe: object) -> Iterator[View]:
    """The views of the source in a recipe."""
    if isinstance(recipe, View):
        yield recipe
    elif isinstance(recipe, Struct):
        for name in recipe.__struct_fields__:
            yield from _views(getattr(recipe, name))


def parcels(table: LiveTable, needs: Iterable[Need], receiver: int) -> list[Parcel]:
    """What `receiver` lacks of `needs`, each element once. Pure: every rank finds the same.

    A chunk's rectangles that overlap are sent as one.
    """
    files, found = SourceFiles(table.index), []
    for need in needs:
        for chunk, common in files.chunks_of(need.slab, need.shape, need.rectangles):
            sender, address = table.place_for(chunk, receiver)
            if sender == receiver:
                continue
            whole = files.rectangle(need.slab, chunk, common, need.dtype)
            shift = address - chunk.offset
            for rectangle in disjoint(_clipped(whole, need.rectangles)):
                part = Part(need.slab, chunk.file, chunk.offset, rectangle)
                found.append(_parcel(sender, part, whole, shift, need.dtype.itemsize))
    return found


def _parcel(sender: int, part: Part, whole: SourceRectangle, shift: int, itemsize: int) -> Parcel:
    top, _, left, _ = part.rectangle
    strides = (whole.row_stride, whole.column_stride)
    address = whole.offset + shift + (top - whole.rows[0]) * strides[0] + (left - whole.columns[0]) * strides[1]
    return Parcel(sender, part, address, strides, itemsize)


def _clipped(whole: SourceRectangle, needed: Iterable[Rectangle]) -> list[Rectangle]:
    result = []
    for top, bottom, left, right in needed:
        rows = max(top, whole.rows[0]), min(bottom, whole.rows[1])
        columns = max(left, whole.columns[0]), min(right, whole.columns[1])
        if rows[0] < rows[1] and columns[0] < columns[1]:
            result.append((*rows, *columns))
    return result


def disjoint(rectangles: Iterable[Rectangle]) -> list[Rectangle]:
    """Rectangles that cover the given ones and do not overlap: those that do become the one around them."""
    result: list[Rectangle] = []
    for rectangle in sorted(set(rectangles)):
        grown, merged = rectangle, True
        while merged:
            touching = [each for each in result if _overlap(each, grown)]
            merged = bool(touching)
            result = [each for each in result if each not in touching]
            for each in touching:
                grown = (min(grown[0], each[0]), max(grown[1], each[1]), min(grown[2], each[2]), max(grown[3], each[3]))
        result.append(grown)
    return sorted(result)


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def exchange(
    needed: Mapping[int, Sequence[Parcel]], memory: RankMemory, rank: int, *, group: Any = None, device: Any = "cpu"
) -> list[tuple[Part, torch.Tensor]]:
    """Send what others need of this rank's memory and receive what it needs: (part, its elements as bytes).

    Collective over `group` (default: all processes): every rank calls it with the same `needed` (receiver -> its
    parcels; ranks of the group). Pairs of ranks exchange one packed message each way; `device` is where messages live,
    a CUDA device for NCCL. Memory: the bytes of this rank's own parcels, and of those that it sends, of which messages
    alike for several receivers are packed once.
    """
    import torch.distributed as dist

    def peer(number: int) -> int:
        return dist.get_global_rank(group, number) if group is not None else number

    operations, received = [], []
    messages: dict[tuple[Parcel, ...], torch.Tensor] = {}
    for receiver in sorted(needed):
        for sender in sorted({parcel.sender for parcel in needed[receiver]}):
            if rank not in (sender, receiver):
                continue
            message = tuple(parcel for parcel in needed[receiver] if parcel.sender == sender)
            if rank == sender:
                if message not in messages:
                    messages[message] = pack(message, memory, device)
                operations.append(dist.P2POp(dist.isend, messages[message], peer(receiver), group))
            else:
                buffer = torch.empty(sum(parcel.num_bytes for parcel in message), dtype=torch.uint8, device=device)
                operations.append(dist.P2POp(dist.irecv, buffer, peer(sender), group))
                received.append((message, buffer))
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return [item for message, buffer in received for item in unpack(message, buffer)]


def pack(message: Sequence[Parcel], memory: RankMemory, device: Any = "cpu") -> torch.Tensor:
    """The parcels' elements one after the other, uint8."""
    packed = torch.empty(sum(parcel.num_bytes for parcel in message), dtype=torch.uint8, device=device)
    start = 0
    for parcel in message:
        elements = memory.elements(parcel.address, parcel.itemsize, parcel.shape, parcel.strides)
        packed[start : start + parcel.num_bytes] = elements.contiguous().reshape(-1).view(torch.uint8)
        start += parcel.num_bytes
    return packed


def unpack(message: Sequence[Parcel], buffer: torch.Tensor) -> list[tuple[Part, torch.Tensor]]:
    """(part, its bytes within `buffer`) of every parcel."""
    result, start = [], 0
    for parcel in message:
        result.append((parcel.part, buffer[start : start + parcel.num_bytes]))
        start += parcel.num_bytes
    return result
