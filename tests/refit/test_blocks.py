"""However changes are cut into runs and divided among logs: the old file and the logs together are the new file."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_export.errors import ExportError
from dist_export.refit.blocks import BLOCK_BYTES, BlockLog, ComparedFile, NewContent, read_index

SIZE = 5 * BLOCK_BYTES + 123
spans = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 2 * BLOCK_BYTES)), max_size=6)
cuts = st.lists(st.integers(1, SIZE - 1), max_size=8, unique=True).map(sorted)


@settings(max_examples=40, deadline=None)
@given(changes=spans, runs=cuts, reads=cuts, num_logs=st.integers(1, 3))
def test_old_file_and_logs_are_the_new_file(
    changes: list[tuple[int, int]], runs: list[int], reads: list[int], num_logs: int
) -> None:
    old = os.urandom(SIZE)
    new = bytearray(old)
    for first, length in changes:
        new[first : first + length] = bytes(each ^ 1 for each in new[first : first + length])
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "old").write_bytes(old)
        logs = [BlockLog(folder, f"{number:05d}") for number in range(num_logs)]
        files = [ComparedFile(7, folder / "old", log, [0]) for log in logs]
        other = ComparedFile(3, folder / "old", logs[0], [0])
        other.write_at(5, memoryview(b"of another file"))
        for number, (first, end) in enumerate(zip([0, *runs], [*runs, SIZE], strict=True)):
            files[number % num_logs].write_at(first, memoryview(new)[first:end])
        for log in logs:
            log.finish()
        num_bytes = sum(file.num_bytes_written for file in files)
        differing = sum(a != b for a, b in zip(old, new, strict=True))
        assert differing <= num_bytes and (num_bytes == 0) == (old == new)
        assert any(file.changed for file in files) == (old != new)
        with NewContent(folder / "old", 7, folder) as content:
            for first, end in zip([0, *reads], [*reads, SIZE], strict=True):
                buffer = memoryview(bytearray(end - first))
                content.read(first, buffer)
                assert buffer == new[first:end]
        assert (folder / "old").read_bytes() == old
    finally:
        shutil.rmtree(folder)


def test_unchanged_blocks_are_not_logged(tmp_path: Path) -> None:
    old = bytearray(os.urandom(SIZE))
    (tmp_path / "old").write_bytes(old)
    log = BlockLog(tmp_path, "0")
    file = ComparedFile(0, tmp_path / "old", log, [0, 2 * BLOCK_BYTES, 4 * BLOCK_BYTES])
    for place in (BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 1, SIZE - 1):
        old[place] ^= 255
    for first, end in ((0, 2), (2, 4), (4, 6)):
        file.write_at(first * BLOCK_BYTES, memoryview(old)[first * BLOCK_BYTES : end * BLOCK_BYTES])
    log.finish()
    records, positions = read_index(tmp_path, "0")
    assert records.tolist()[0][:3] == (0, 2 * BLOCK_BYTES, 0)  # neighbours are one run
    assert [record[2] for record in records.tolist()] == [0, 3 * BLOCK_BYTES, 5 * BLOCK_BYTES]
    assert positions.tolist() == [0, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES]
    assert log.num_blocks == 4 and file.changed == {0, 1, 2}


def test_an_old_file_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"short")
    file = ComparedFile(0, tmp_path / "old", BlockLog(tmp_path, "0"), [0])
    with pytest.raises(ExportError, match="old: ends at byte 5; it was changed meanwhile"):
        file.write_at(3, memoryview(b"longer"))
    with pytest.raises(ExportError, match=r"0\.blocks: cannot write: File exists"):
        BlockLog(tmp_path, "0")


@pytest.mark.parametrize("ending, change", [(".blocks", 1), (".blocks", -1), (".index", 1), (".index", -1)])
def test_a_log_that_was_cut_or_continued(ending: str, change: int, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(bytes(100))
    log = BlockLog(tmp_path, "0")
    ComparedFile(0, tmp_path / "old", log, [0]).write_at(0, memoryview(b"new"))
    log.finish()
    assert len(read_index(tmp_path, "0")[0]) == 1
    path = tmp_path / f"0{ending}"
    path.write_bytes((path.read_bytes() + b"x")[: path.stat().st_size + change])
    with pytest.raises(ExportError, match=r"does not hold what 0\.index says; it was cut off or changed"):
        read_index(tmp_path, "0")


def test_changes_that_begin_with_a_tensor_are_that_tensor_s(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(bytes(100))
    file = ComparedFile(0, tmp_path / "old", BlockLog(tmp_path, "0"), [0, 40, 80])
    file.write_at(40, memoryview(b"new"))
    assert file.changed == {1}
