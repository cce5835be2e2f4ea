"""A header and named integer arrays in one buffer, so that processes can share them by mapping it.

Layout: eight bytes of magic, eight of header length, a JSON header, then the arrays, each on a multiple of 64
bytes. Reading makes no copy and builds nothing but the header: a buffer is data, never code.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_export.errors import ExportError

Array = npt.NDArray[np.int64] | npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview | mmap.mmap

_MAGIC = b"DXARRAY1"
_ALIGNMENT = 64  # bytes
_TYPES: dict[str, np.dtype[Any]] = {"int64": np.dtype("<i8"), "uint8": np.dtype("u1")}


def pack(header: Mapping[str, object], arrays: Mapping[str, Array]) -> bytes:
    """`header` (JSON values) and one-dimensional `arrays` of int64 or uint8 as bytes."""
    table, end = [], 0
    for name, array in arrays.items():
        start = _aligned(end)
        table.append([name, array.dtype.name, start, array.size])
        end = start + array.nbytes
    text = json.dumps({"header": header, "arrays": table}, separators=(",", ":")).encode("ascii")
    data_start = _aligned(16 + len(text))
    result = bytearray(data_start + end)
    result[: 16 + len(text)] = _MAGIC + struct.pack("<Q", len(text)) + text
    for (_, _, start, _), array in zip(table, arrays.values(), strict=True):
        begin = data_start + start
        result[begin : begin + array.nbytes] = np.ascontiguousarray(array).tobytes()
    return bytes(result)


def unpack(buffer: Buffer, *, origin: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """What `pack` was given; the arrays are read-only views of `buffer`, which must stay as it is.

    Raises `ExportError` naming `origin` when the buffer is cut or was not made by `pack`.
    """
    view = memoryview(buffer)
    try:
        if bytes(view[:8]) != _MAGIC:
            raise ValueError("it starts with other bytes")
        (length,) = struct.unpack_from("<Q", view, 8)
        if length > len(view) - 16:
            raise ValueError("it is cut off inside its header")
        content = json.loads(bytes(view[16 : 16 + length]))
        data = view[_aligned(16 + length) :]
        arrays = {str(name): _array(data, kind, start, count) for name, kind, start, count in content["arrays"]}
        return dict(content["header"]), arrays
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ExportError(f"{origin}: not a table of arrays: {error}") from error


def _array(data: memoryview, kind: str, start: int, count: int) -> Array:
    dtype = _TYPES[kind]
    if start < 0 or count < 0 or start + count * dtype.itemsize > len(data):
        raise ValueError(f"an array of {count} elements at {start} in {len(data)} bytes")
    array: Array = np.frombuffer(data, dtype, count, start)
    array.flags.writeable = False
    return array


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
