"""Progress of a run: counters per rank, one line for the whole job."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TextIO

from msgspec import Struct

#: Seconds over which the shown rate is averaged.
_RATE_WINDOW_S = 10.0
#: Seconds between lines where standard error is no terminal.
_PLAIN_INTERVAL_S = 10.0

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class ProgressCounts(Struct, frozen=True):
    """Bytes read and written so far, and to be written in all."""

    bytes_read: int = 0
    bytes_written: int = 0
    total: int = 0

    @staticmethod
    def sum(counts: Iterable[ProgressCounts]) -> ProgressCounts:
        """The counts of several ranks together."""
        rows = [(each.bytes_read, each.bytes_written, each.total) for each in counts]
        return ProgressCounts(*(sum(column) for column in zip(*rows, strict=True)))


class Progress:
    """The counters of this rank; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = ProgressCounts()

    def add(self, *, bytes_read: int = 0, bytes_written: int = 0, total: int = 0) -> None:
        """Add bytes to the counters; `total` grows when a rank learns what it has to write."""
        with self._lock:
            now = self._counts
            self._counts = ProgressCounts(
                now.bytes_read + bytes_read, now.bytes_written + bytes_written, now.total + total
            )

    def counts(self) -> ProgressCounts:
        """The counters now."""
        return self._counts


class RateMeter:
    """Bytes per second, averaged over the last `_RATE_WINDOW_S` seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def update(self, now: float, num_bytes: int) -> float | None:
        """Take a counter's value at `now` (seconds); the rate, or None while there is only one value."""
        self._samples.append((now, num_bytes))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _RATE_WINDOW_S:
            self._samples.popleft()
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - start) if end > start else None


class ProgressLine:
    """Shows the progress of a job: a live line on a terminal, else a plain line every 10 s at most."""

    def __init__(
        self,
        stream: TextIO,
        *,
        num_ranks: int,
        label: str = "exporting",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._num_ranks = num_ranks
        self._label = label
        self._clock = clock
        self._live = stream.isatty()
        self._meter = RateMeter()
        self._next_line = clock() + (0.0 if self._live else _PLAIN_INTERVAL_S)

    def update(self, counts: ProgressCounts) -> None:
        """Take the job's counters of now, and show them when it is time."""
        now = self._clock()
        rate = self._meter.update(now, counts.bytes_written)
        if counts.total == 0 or now < self._next_line:
            return
        text = format_progress(counts, rate=rate, num_ranks=self._num_ranks, label=self._label)
        self._write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        self._next_line = now + (0.0 if self._live else _PLAIN_INTERVAL_S)

    def close(self) -> None:
        """Erase the live line, so that what is printed next starts on a clean one."""
        if self._live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def format_progress(counts: ProgressCounts, *, rate: float | None, num_ranks: int, label: str) -> str:
    """``exporting  45 %  3.2 of 7.1 GB  1.9 GB/s  ETA 0:02  8 ranks``; `rate` in bytes per second, if known."""
    parts = [label]
    if counts.total > 0:
        parts.append(f"{min(100, 100 * counts.bytes_written // counts.total):d} %")
        parts.append(format_part(counts.bytes_written, counts.total))
    if rate is not None:
        parts.append(format_rate(rate))
        if rate > 0 and counts.total > counts.bytes_written:
            parts.append(f"ETA {format_duration((counts.total - counts.bytes_written) / rate)}")
    parts.append(f"{num_ranks} rank{'' if num_ranks == 1 else 's'}")
    return "  ".join(parts)


def format_bytes(count: float) -> str:
    """Decimal units: 999 → ``999 B``, 3 200 000 000 → ``3.2 GB``."""
    scaled, unit = _scale(count)
    return f"{_number(scaled, unit)} {unit}"


def format_part(part: int, total: int) -> str:
    """``3.2 of 7.1 GB``: both in the unit of the whole."""
    scaled, unit = _scale(total)
    return f"{_number(part * scaled / total if total else 0.0, unit)} of {_number(scaled, unit)} {unit}"


def format_rate(rate: float) -> str:
    """Bytes per second: ``1.9 GB/s``."""
    return f"{format_bytes(rate)}/s"


def format_duration(seconds: float) -> str:
    """``0:02``, ``12:40``, ``3:05:09``; rounded up to whole seconds."""
    whole = int(-(-seconds // 1))
    minutes, hours = whole // 60, whole // 3600
    return f"{hours}:{minutes % 60:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _scale(count: float) -> tuple[float, str]:
    exponent = 0
    while count >= 999.95 and exponent < len(_UNITS) - 1:
        count /= 1000
        exponent += 1
    return count, _UNITS[exponent]


def _number(value: float, unit: str) -> str:
    return f"{value:.0f}" if unit == "B" else f"{value:.1f}"
