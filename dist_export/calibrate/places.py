"""What each rank's quantisers hold, put together: a quantiser's numbers lie in the model as its linear's weight does.

Importing this module imports torch.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Mapping

import torch
from msgspec import Struct

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import Faults
from dist_export.verify.megatron_weights import ParameterSource

_LENGTH = struct.Struct("<Q")


class Place(Struct, frozen=True):
    """Where a rank's weight lies in its linear's whole weight ``[rows, columns]``."""

    rows: tuple[tuple[int, int], ...]
    """(first row, number of rows), in the order that the rank has them: gate and up are two."""
    first_column: int


class Piece(Struct, frozen=True):
    """A part of a quantiser's tensor."""

    name: str
    start: tuple[int, ...]
    values: torch.Tensor


def place_of(source: ParameterSource, index: CheckpointIndex) -> Place:
    """Of a weight, by where Megatron says that the checkpoint has it. Keys (of gate, of up) follow one another."""
    rows, offsets, num_rows = [], {}, 0
    for key, box in source.parts:
        if key not in offsets:
            offsets[key] = num_rows
            num_rows += index.tensors[key].shape[-2]
        rows.append((offsets[key] + box.start[-2], box.size[-2]))
    return Place(tuple(rows), source.parts[0][1].start[-1])


def pieces_of(name: str, values: torch.Tensor, place: Place, *, block: int | None) -> Iterator[Piece]:
    """A rank's tensor: one number ``[1]``, one per column ``[columns]``, per row ``[rows, 1]``, or per `block` of
    columns ``[rows, blocks]``."""
    if values.numel() == 1 and values.dim() == 1:
        yield Piece(name, (0,), values)
    elif values.dim() == 1:
        yield Piece(name, (place.first_column,), values)
    else:
        column = place.first_column // block if block else 0
        ends = list(itertools.accumulate((size for _, size in place.rows), initial=0))
        for (row, _), first, end in zip(place.rows, ends[:-1], ends[1:], strict=True):
            yield Piece(name, (row, column), values[first:end])


def encode(pieces: Iterable[Piece]) -> bytes:
    """Pieces as bytes, for another rank."""
    heads, data = [], bytearray()
    for piece in pieces:
        values = piece.values.contiguous()
        heads.append([piece.name, piece.start, list(values.shape), str(values.dtype).removeprefix("torch.")])
        data += values.view(-1).view(torch.uint8).numpy().tobytes()
    head = json.dumps(heads).encode()
    return _LENGTH.pack(len(head)) + head + bytes(data)


def decode(packed: bytes) -> Iterator[Piece]:
    """The inverse of `encode`."""
    (length,) = _LENGTH.unpack_from(packed)
    offset, data = _LENGTH.size + length, bytearray(packed)
    for name, start, shape, kind in json.loads(packed[_LENGTH.size : offset]):
        dtype: torch.dtype = getattr(torch, kind)
        count = torch.Size(shape).numel()
        values = torch.frombuffer(data, dtype=dtype, count=count, offset=offset).reshape(shape)
        offset += count * dtype.itemsize
        yield Piece(name, tuple(start), values)


def merge(parts: Mapping[int, Iterable[Piece]]) -> dict[str, torch.Tensor]:
    """The whole tensors of every rank's pieces; what several ranks hold must be equal.

    Raises `ExportError` naming the tensors that are not, and such as have gaps.
    """
    found: dict[str, list[tuple[int, Piece]]] = {}
    for rank, pieces in parts.items():
        for piece in pieces:
            found.setdefault(piece.name, []).append((rank, piece))
    faults = Faults("what the ranks found does not make one calibration")
    merged = {name: _merged(each, faults) for name, each in sorted(found.items())}
    faults.raise_if_any()
    return merged


def _merged(pieces: list[tuple[int, Piece]], faults: Faults) -> torch.Tensor:
    first = pieces[0][1]
    stops = [[a + n for a, n in zip(each.start, each.values.shape, strict=True)] for _, each in pieces]
    whole = torch.zeros([max(column) for column in zip(*stops, strict=True)], dtype=first.values.dtype)
    owner = torch.full(whole.shape, -1, dtype=torch.int32)
    for rank, piece in pieces:
        place = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.values.shape, strict=True))
        different = (owner[place] >= 0) & (whole[place] != piece.values)
        if bool(different.any()):
            other = int(owner[place][different][0])
            faults.add(f"{piece.name}: ranks {other} and {rank} hold different numbers for the same part of it")
        whole[place], owner[place] = piece.values, rank
    if bool((owner < 0).any()):
        faults.add(f"{first.name}: no rank holds {int((owner < 0).sum())} of its {owner.numel()} numbers")
    return whole
