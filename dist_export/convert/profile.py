"""Where the time of a run goes: a timeline per rank that Chrome's tracing page and Perfetto open, and its sums.

Spans cost a clock reading at each end; without a profile they cost a test of one attribute.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from msgspec import Struct, field

MOST_SPANS = 1 << 20
"""Kept per process, about 100 bytes each; beyond them only sums grow."""
KINDS = (
    *("parse", "plan", "wait", "scales", "read", "merge", "copy"),
    *("to device", "compute", "from device", "checksum", "write", "gather", "sync"),
)
"""In the order in which a summary shows them; any other name comes after."""

_NOTHING = nullcontext()


class Profile(Struct):
    """Spans of one process. Threads may use it at the same time."""

    enabled: bool = True
    _spans: list[tuple[str, int, float, float]] = field(default_factory=list)
    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def span(self, name: str) -> AbstractContextManager[None]:
        """Note the time until the block ends, also where it fails."""
        return self._timed(name) if self.enabled else _NOTHING

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, started, time.monotonic())

    def add(self, name: str, started: float, ended: float) -> None:
        """Note a span by its ends, in seconds of the monotonic clock."""
        with self._lock:
            self._sums[name] += ended - started
            if len(self._spans) < MOST_SPANS:
                self._spans.append((name, threading.get_ident(), started, ended))

    def sums(self) -> Mapping[str, float]:
        """Seconds by kind, of all threads together, in the order of `KINDS`."""
        order = {name: number for number, name in enumerate(KINDS)}
        return dict(sorted(self._sums.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))

    def write(self, path: Path, *, rank: int) -> None:
        """The timeline in Chrome's trace event format (JSON object form, complete events, microseconds)."""
        threads = {ident: number for number, ident in enumerate(dict.fromkeys(span[1] for span in self._spans))}
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        ]
        for name, ident, started, ended in self._spans:
            place = {"pid": rank, "tid": threads[ident]}
            events.append({"ph": "X", "name": name, "ts": started * 1e6, "dur": (ended - started) * 1e6, **place})
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


NO_PROFILE = Profile(enabled=False)
