"""What both halves of `pickle_scan` share: the bounds of a pickle, what was found, and the opcodes that count bytes."""

from __future__ import annotations

import struct

from msgspec import Struct

_SMALL_INTEGER = 7  # bytes; integers from 2**61 - 1 up can be made to share one hash


class ScanLimits(Struct, frozen=True):
    """What a pickle may cost. The dearest opcodes (containers) cost 60 to 230 bytes of memory each."""

    max_bytes: int = 1 << 28
    max_opcodes: int = 10_000_000
    max_depth: int = 256
    """Of containers in containers, as seen on the stack."""
    max_marks: int = 1024
    """Open at the same time."""
    max_globals: int = 4096
    """Different names."""
    max_large_integers: int = 10_000
    """Wider than 7 bytes: as dictionary keys they could all share one hash."""


METADATA_LIMITS = ScanLimits(max_bytes=1 << 31, max_opcodes=200_000_000)
"""For ``.metadata``: 300 000 chunks with save plans are about 77 MB and 35 million opcodes."""


class PickleSummary(Struct, frozen=True):
    """What `prescan` found."""

    end: int
    """Bytes up to and with STOP."""
    globals: frozenset[tuple[str, str]]
    """(module, name) of everything the pickle names."""
    max_memo: int
    """Highest memo index stored to, -1 when none is."""
    num_opcodes: int


class MalformedError(Exception):
    """The pickle cannot or must not be read; the text says why. Only inside this package."""


def counted_span(data: bytes, pos: int, width: int) -> tuple[int, int]:
    """(start, end) of the payload of the counted opcode at `pos`, whose length field has `width` bytes."""
    start = pos + 1 + width
    if start > len(data):
        raise MalformedError(f"it is cut at byte {len(data)}")
    signed = data[pos] in b"T\x8b"
    length = int.from_bytes(data[pos + 1 : start], "little", signed=signed)
    if not 0 <= length <= len(data) - start:
        raise MalformedError(f"byte {pos} announces {length} bytes, {len(data) - start} are left")
    return start, start + length


def is_large_integer(data: bytes, pos: int, start: int, end: int) -> bool:
    """Whether the counted opcode at `pos` is an integer wider than dictionaries can safely hash."""
    return data[pos] in b"\x8a\x8b" and end - start > _SMALL_INTEGER


def check_frame(data: bytes, pos: int) -> int:
    """Position after the FRAME opcode at `pos`; its declared length must fit."""
    if pos + 9 > len(data):
        raise MalformedError(f"it is cut at byte {len(data)}")
    (length,) = struct.unpack_from("<Q", data, pos + 1)
    if length > len(data) - pos - 9:
        raise MalformedError(f"the frame at byte {pos} announces {length} bytes, {len(data) - pos - 9} are left")
    return pos + 9
