"""The safetensors container: eight bytes of header length, a JSON header, then the tensors without gaps.

Written from a plan before any byte is read, so tensors can stream to their final offsets; read back
to compare and to verify. The layout is that of the format's own description
(safetensors README, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import DType, dtype_by_safetensors_code

DATA_ALIGNMENT = 4096  # bytes, one page: tensors then start on page boundaries where their sizes allow
MAX_HEADER = 100_000_000  # bytes, the format's own limit


class StoredTensor(Struct, frozen=True):
    """A tensor in a safetensors file."""

    dtype: DType
    shape: Shape
    offset: int  # bytes from the start of the file
    num_bytes: int


def build_header(tensors: Iterable[tuple[str, DType, Shape, int]], *, metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: `tensors` are (name, dtype, shape, offset in the data section in bytes).

    Padded with spaces so that the data starts on a page boundary.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, dtype, shape, offset in tensors:
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        table[name] = {
            "dtype": dtype.safetensors,
            "shape": list(shape),
            "data_offsets": [offset, offset + num_bytes],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, each of the bytes that its shape needs, none overlapping another.

    Raises `ExportError` naming the file when it is not a whole one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise ExportError(f"{path}: not a safetensors file, or cut off inside its header")
        text = file.read(length)
    try:
        table = json.loads(text)
        tensors = {
            name: _stored(entry, 8 + length, where=f"{path}: {name}")
            for name, entry in table.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path}: its safetensors header cannot be read: {error}") from error
    _check_disjoint(path, tensors)
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise ExportError(f"{path}: has {size} bytes, its header says {end}; it is cut off or was appended to")
    return tensors


def _stored(entry: Mapping[str, list[int]], data_start: int, *, where: str) -> StoredTensor:
    """One entry of a header: its type, shape and bytes must agree."""
    dtype = dtype_by_safetensors_code(str(entry["dtype"]), where=where)
    (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ExportError(f"{where}: shape {list(shape)} at bytes {start} to {end} is none; the file is damaged")
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - start != num_bytes:
        raise ExportError(f"{where}: has {end - start} bytes, {dtype} {list(shape)} needs {num_bytes}; it is damaged")
    return StoredTensor(dtype, shape, data_start + start, num_bytes)


def _check_disjoint(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    previous, end = "", 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.num_bytes and tensor.offset < end:
            raise ExportError(f"{path}: {name} overlaps {previous}; the file is damaged")
        if tensor.num_bytes:
            previous, end = name, tensor.offset + tensor.num_bytes
