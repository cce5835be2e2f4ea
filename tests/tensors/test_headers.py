"""Headers of files that came from elsewhere: what they say of a tensor's bytes is not believed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from dist_export.errors import ExportError
from dist_export.tensors.safetensors_format import read_header

Entry = tuple[str, list[object], list[object]]
WRONG: dict[str, tuple[list[Entry], str]] = {
    "too long": ([("F32", [2], [0, 16])], r"t0: has 16 bytes, float32 \[2\] needs 8"),
    "too short": ([("F32", [2], [0, 4]), ("I8", [12], [4, 16])], r"t0: has 4 bytes, float32 \[2\] needs 8"),
    "backwards": ([("I8", [16], [0, 16]), ("I8", [4], [8, 4])], r"t1: has -4 bytes, int8 \[4\] needs 4"),
    "before the data": ([("I8", [16], [0, 16]), ("I8", [8], [-8, 0])], r"t1: shape \[8\] at bytes -8 to 0 is none"),
    "negative sizes": ([("I8", [-4, -4], [0, 16])], r"t0: shape \[-4, -4\] at bytes 0 to 16 is none"),
    "fractions": ([("I8", [16], [0.0, 16.0])], r"t0: shape \[16\] at bytes 0.0 to 16.0 is none"),
    "overlapping": ([("I8", [12], [0, 12]), ("I8", [8], [8, 16])], "t1 overlaps t0"),
    "the same bytes": ([("I8", [16], [0, 16]), ("U8", [16], [0, 16])], "t1 overlaps t0"),
    "type": ([("F4", [32], [0, 16])], "t0: unknown element type code 'F4'"),
    "three offsets": ([("I8", [16], [0, 16, 32])], "its safetensors header cannot be read"),
}


def write(path: Path, entries: list[Entry]) -> None:
    """A file with 16 bytes of data."""
    table = {f"t{n}": {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in enumerate(entries)}
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


@pytest.mark.parametrize("name", WRONG)
def test_bytes_that_are_not_the_tensors(name: str, tmp_path: Path) -> None:
    entries, message = WRONG[name]
    write(tmp_path / "x.safetensors", entries)
    with pytest.raises(ExportError, match=f"x.safetensors: {message}"):
        read_header(tmp_path / "x.safetensors")


def test_empty_tensors_lie_anywhere(tmp_path: Path) -> None:
    write(tmp_path / "x", [("I8", [16], [0, 16]), ("F32", [0, 7], [8, 8]), ("F32", [2, 0], [16, 16])])
    found = read_header(tmp_path / "x")
    assert [each.num_bytes for each in found.values()] == [16, 0, 0] and found["t1"].shape == (0, 7)
