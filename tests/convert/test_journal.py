"""The journal: written by a process that is killed, read by another, believed only as far as the bytes agree."""

from __future__ import annotations

import os
import signal
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_export.convert.journal import (
    FINGERPRINT,
    FLUSH_EVERY_S,
    FOLDER,
    Done,
    Journal,
    confirmed,
    read_fingerprint,
    read_journals,
    remove_journals,
    write_fingerprint,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_fingerprint(tmp_path, {"job": "x"})
    return tmp_path


def test_what_one_process_notes_another_reads(folder: Path) -> None:
    first, second = (Journal(folder / FOLDER / f"{rank}.txt") for rank in range(2))
    first.note((0, 1), (0, 10, 5))
    second.note((0, 1), (10, 10, 6))
    second.note((3, 0), (7, 1, 4294967295))
    first.close()
    second.close()
    assert read_journals(folder) == {(0, 1): [(0, 10, 5), (10, 10, 6)], (3, 0): [(7, 1, 4294967295)]}


def test_a_kill_loses_what_the_last_moment_noted_and_no_more(folder: Path) -> None:
    pid = os.fork()
    if pid == 0:
        journal = Journal(folder / FOLDER / "0.txt")
        for number in range(10):
            time.sleep(0.3 * FLUSH_EVERY_S)
            journal.note((0, 0), (number, 1, number))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    runs = read_journals(folder)[0, 0]
    assert runs == [(number, 1, number) for number in range(len(runs))]
    assert len(runs) >= 6


def test_lines_that_are_cut_or_foreign_are_passed_over(folder: Path) -> None:
    path = folder / FOLDER / "0.txt"
    path.write_bytes(
        b"0 0 0 5 1\n\xff\xfe\n1 2 3\n-1 0 0 5 1\n0 0 5 x 1\n0 0 \xc2\xb2 5 1\n\n"
        + b"9" * 5000 + b" 0 0 0 0\n0 0 5 5 2"
    )
    assert read_journals(folder) == {(0, 0): [(0, 5, 1)]}


def test_no_journal_and_no_fingerprint(tmp_path: Path) -> None:
    assert read_journals(tmp_path) == {}
    assert read_fingerprint(tmp_path) is None
    for text in ("", "{", "[1]", '{"job": "x'):
        (tmp_path / FINGERPRINT).write_text(text)
        assert read_fingerprint(tmp_path) is None


def test_everything_is_removed(folder: Path) -> None:
    assert read_fingerprint(folder) == {"job": "x"}
    Journal(folder / FOLDER / "0.txt").close()
    remove_journals(folder)
    assert list(folder.iterdir()) == []


def test_closing_a_journal_on_a_full_disk_raises_nothing() -> None:
    journal = Journal(Path("/dev/full"))
    journal.note((0, 0), (0, 1, 1))
    journal.close()


def test_runs_are_believed_when_their_bytes_agree(tmp_path: Path) -> None:
    path, start = tmp_path / "rank0.safetensors", 3
    data = bytes(range(100))
    path.write_bytes(b"..." + data)

    def run(offset: int, length: int, change: int = 0) -> tuple[int, int, int]:
        return offset, length, zlib.crc32(data[offset : offset + length]) ^ change

    runs = [run(0, 10), run(10, 10, change=1), run(20, 5), run(20, 5), run(22, 10), run(90, 10)]
    beyond = [(90, 11, 0), (100, 1, 0), (10**17, 5, 0), (50, 0, 0)]
    assert list(confirmed(path, start, 100, [*runs, *beyond])) == [run(0, 10), run(20, 5), run(90, 10)]
    shorter = [run(80, 15), run(90, 10)]  # of which the last reaches into the next tensor
    assert list(confirmed(path, start, 95, shorter[1:])) == []
    assert list(confirmed(path, start, 95, shorter)) == shorter[:1]
    os.truncate(path, start + 95)
    assert list(confirmed(path, start, 100, runs)) == [run(0, 10), run(20, 5)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=8), st.integers(0, 60), st.integers(0, 30))
def test_missing_is_what_no_run_covers(spans: list[tuple[int, int]], offset: int, length: int) -> None:
    disjoint, end = [], 0
    for start, size in sorted(spans):
        if start >= end:
            disjoint.append((start, size, 0))
            end = start + size
    covered = {byte for start, size, _ in disjoint for byte in range(start, start + size)}
    missing = Done({(1, 2): disjoint}).missing((1, 2), offset, length)
    assert [b for a, n in missing for b in range(a, a + n)] == [
        byte for byte in range(offset, offset + length) if byte not in covered
    ]
    assert all(n > 0 for _, n in missing)
    assert Done({}).missing((1, 2), offset, length) == ([(offset, length)] if length else [])
