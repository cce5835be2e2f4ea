"""Progress: formats, and when a line is shown."""

from __future__ import annotations

import io
import threading

import pytest

from dist_export.runtime.progress import (
    Progress,
    ProgressCounts,
    ProgressLine,
    format_bytes,
    format_duration,
    format_part,
    format_progress,
    format_rate,
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_951, "1.0 MB"),
     (3_200_000_000, "3.2 GB"), (7e12, "7.0 TB"), (2e18, "2000.0 PB")],
)  # fmt: skip
def test_bytes(count: float, expected: str) -> None:
    assert format_bytes(count) == expected


def test_part_and_rate() -> None:
    assert format_part(3_200_000_000, 7_100_000_000) == "3.2 of 7.1 GB"
    assert format_part(1_000_000, 7_100_000_000) == "0.0 of 7.1 GB"
    assert format_part(0, 0) == "0 of 0 B"
    assert format_rate(1.9e9) == "1.9 GB/s"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (0.2, "0:01"), (2, "0:02"), (59.5, "1:00"), (760, "12:40"), (3600, "1:00:00"), (11109, "3:05:09")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


def test_line() -> None:
    counts = ProgressCounts(3_300_000_000, 3_200_000_000, 7_000_000_000)
    line = format_progress(counts, rate=1.9e9, num_ranks=8, label="exporting")
    assert line == "exporting  45 %  3.2 of 7.0 GB  1.9 GB/s  ETA 0:02  8 ranks"
    line = format_progress(ProgressCounts(0, 10, 10), rate=0.0, num_ranks=1, label="verifying")
    assert line == "verifying  100 %  10 of 10 B  0 B/s  1 rank"


def test_counters_add_up_over_threads() -> None:
    progress = Progress()

    def work() -> None:
        for _ in range(5000):
            progress.add(bytes_read=1, bytes_written=2, total=3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress.counts() == ProgressCounts(20_000, 40_000, 60_000)
    assert ProgressCounts.sum([progress.counts(), ProgressCounts(1, 1, 1)]) == ProgressCounts(20_001, 40_001, 60_001)


def test_a_terminal_gets_one_live_line_with_the_recent_rate() -> None:
    stream, now = Terminal(), [0.0]
    line = ProgressLine(stream, num_ranks=2, clock=lambda: now[0])
    for second in range(41):  # 1 MB/s for 20 s, then 2 MB/s
        now[0] = float(second)
        line.update(ProgressCounts(0, 1_000_000 * (second + max(0, second - 20)), 100_000_000))
    line.close()
    shown = stream.getvalue().split("\r\x1b[K")
    assert shown[0] == "" and shown[-1] == ""
    assert "\n" not in stream.getvalue()
    assert shown[21] == "exporting  20 %  20.0 of 100.0 MB  1.0 MB/s  ETA 1:20  2 ranks"
    assert shown[41] == "exporting  60 %  60.0 of 100.0 MB  2.0 MB/s  ETA 0:20  2 ranks"


def test_a_file_gets_a_plain_line_every_ten_seconds() -> None:
    stream, now = io.StringIO(), [0.0]
    line = ProgressLine(stream, num_ranks=2, clock=lambda: now[0])
    for second in range(35):
        now[0] = float(second)
        line.update(ProgressCounts(0, 1_000_000 * second, 100_000_000))
    line.close()
    assert [text.split("  ")[1] for text in stream.getvalue().splitlines()] == ["10 %", "20 %", "30 %"]


def test_nothing_is_shown_before_the_total_is_known() -> None:
    stream = Terminal()
    line = ProgressLine(stream, num_ranks=1)
    line.update(ProgressCounts(5, 0, 0))
    assert stream.getvalue() == ""
