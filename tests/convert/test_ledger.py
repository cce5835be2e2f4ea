"""Checksums of runs in any order are the checksum of the whole; gaps and overlaps do not pass."""

from __future__ import annotations

import itertools
import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_export.convert import ledger as ledger_module
from dist_export.convert.ledger import Ledger, Run, checksum_of, merged
from dist_export.errors import Faults


def run_of(data: bytes, start: int, end: int) -> Run:
    return start, end - start, zlib.crc32(data[start:end])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_order_of_runs_does_not_matter(data: st.DataObject) -> None:
    whole = data.draw(st.binary(min_size=1, max_size=300))
    cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=8))})
    runs = [run_of(whole, a, b) for a, b in itertools.pairwise(cuts)]
    shuffled = data.draw(st.permutations(runs))
    split = data.draw(st.integers(0, len(runs)))
    faults = Faults("export")
    of_two_processes = merged(shuffled[:split]) + merged(shuffled[split:])
    assert checksum_of(of_two_processes, name="w", num_bytes=len(whole), faults=faults) == zlib.crc32(whole)
    assert not faults


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 40), (50, 100)], "w: 90 bytes were written in 2 runs, expected 100 in one"),
        ([(0, 60), (50, 100)], "w: 110 bytes were written in 2 runs, expected 100 in one"),
        ([(0, 100), (0, 100)], "w: 200 bytes were written in 2 runs, expected 100 in one"),
        ([(0, 50)], "w: 50 bytes were written in 1 runs, expected 100 in one"),
        ([(10, 100)], "w: 90 bytes were written in 1 runs, expected 100 in one"),
        ([], "w: 0 bytes were written in 0 runs, expected 100 in one"),
    ],
    ids=["gap", "overlap", "twice", "short", "late", "nothing"],
)
def test_gaps_and_overlaps_are_faults(runs: list[tuple[int, int]], message: str) -> None:
    data, faults = bytes(range(100)), Faults("export")
    checksum_of([run_of(data, *run) for run in runs], name="w", num_bytes=100, faults=faults)
    assert faults.messages == [message]


def test_an_empty_tensor_needs_no_run() -> None:
    faults = Faults("export")
    assert checksum_of([], name="w", num_bytes=0, faults=faults) == 0
    assert not faults


def test_threads_note_runs_and_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "COMPACT_EVERY", 16)
    ledger, data = Ledger(), bytes(range(256)) * 4
    largest = 0

    def note(first: int) -> None:
        nonlocal largest
        for start in range(first * 8, len(data), 32):
            ledger.note((0, 1), start, memoryview(data)[start : start + 8])
            largest = max(largest, len(ledger._runs[0, 1]))

    threads = [threading.Thread(target=note, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.runs() == {(0, 1): [(0, len(data), zlib.crc32(data))]}
    assert largest < 128
