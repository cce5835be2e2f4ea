"""What a run tells programs about itself: events as JSON lines, and a progress file for schedulers.

Every event has ``event`` (``start``, ``phase``, ``progress``, ``failure``, ``done``) and ``time`` (seconds since the
epoch). The progress file holds one JSON object and is replaced whole, so that a reader never sees a part of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_export.errors import ExportError
from dist_export.runtime.failure import Failure
from dist_export.runtime.group import Group
from dist_export.runtime.progress import RateMeter
from dist_export.runtime.run import print_failure

#: Seconds between two writes of the progress file, and between two ``progress`` events.
_FILE_INTERVAL_S, _EVENT_INTERVAL_S = 1.0, 10.0


class Reporter:
    """Where a run's events go; every process has one. Without either option: causes of failures, as text."""

    def __init__(self, *, json_lines: bool = False, progress_file: Path | None = None) -> None:
        """`json_lines`: standard error carries nothing but events. `progress_file` is written once a second."""
        self.json_lines = json_lines
        self._progress_file = progress_file
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise ExportError where the progress file cannot be written. Rank 0 calls it before the work."""
        path = self._progress_file
        if path is None:
            return
        try:
            self._replace_file(path, {"state": "running", "time": time.time()})
        except OSError as error:
            raise ExportError(f"--progress-file {path}: cannot write: {error.strerror}") from error

    def event(self, event: str, **values: object) -> None:
        """Write one JSON line to standard error, where they were asked for."""
        if not self.json_lines:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values})
        with self._lock, contextlib.suppress(OSError):  # nobody reads standard error: the work goes on
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def failure(self, failure: Failure, *, with_rank: bool = True) -> None:
        """Tell why the run failed; called by the one process that reports it."""
        if self.json_lines:
            values = {"rank": failure.rank, "kind": failure.kind, "message": failure.describe(with_rank=with_rank)}
            self.event("failure", **values, exit_code=failure.exit_code)
        else:
            print_failure(failure, with_rank=with_rank)
        self.write_file(**_failed(failure))

    def write_file(self, **values: object) -> None:
        """Replace the progress file, if there is one. A full disk does not stop the work."""
        if self._progress_file is not None:
            with contextlib.suppress(OSError):
                self._replace_file(self._progress_file, {**values, "time": round(time.time(), 3)})

    @contextmanager
    def watch(self, group: Group, **start: object) -> Iterator[None]:
        """While the block runs on rank 0, its events and progress are told; on other ranks this does nothing."""
        if group.rank != 0:
            yield
            return
        self.event("start", launcher=group.world.launcher, num_ranks=group.world_size, **start)
        watcher = _Watcher(self, group)
        group.on_phase = watcher.enter_phase
        watcher.enter_phase(group.phase)
        try:
            yield
        except BaseException as error:
            watcher.close(**_failed(group.failure or Failure.of(group.rank, error)))
            raise
        watcher.close(state="done", exit_code=0)
        self.event("done", exit_code=0, **watcher.totals())

    @staticmethod
    def _replace_file(path: Path, values: dict[str, object]) -> None:
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(values) + "\n")
        os.replace(beside, path)


class _Watcher:
    """Rank 0's thread that writes the progress file and ``progress`` events."""

    def __init__(self, reporter: Reporter, group: Group) -> None:
        self._reporter, self._group = reporter, group
        self._begun = time.monotonic()
        self._meter = RateMeter()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def enter_phase(self, name: str) -> None:
        """The run went on to another phase."""
        self._reporter.event("phase", phase=name)

    def totals(self) -> dict[str, object]:
        """Counters of the job, in bytes, and seconds since its start."""
        counts = self._group.job_progress()
        return {
            "bytes_read": counts.bytes_read,
            "bytes_written": counts.bytes_written,
            "bytes_total": counts.total,
            "num_ranks": self._group.world_size,
            "seconds": round(time.monotonic() - self._begun, 3),
        }

    def close(self, **last: object) -> None:
        """Stop, and write the file for the last time."""
        self._stopping.set()
        self._thread.join(_FILE_INTERVAL_S)
        self._reporter.write_file(**last, phase=self._group.phase, **self.totals())

    def _run(self) -> None:
        next_event = self._begun + _EVENT_INTERVAL_S
        while True:
            now, totals = time.monotonic(), self.totals()
            rate = self._meter.update(now, self._group.job_progress().bytes_written)
            totals["bytes_per_second"] = None if rate is None else round(rate)
            self._reporter.write_file(state="running", phase=self._group.phase, **totals)
            if now >= next_event:
                self._reporter.event("progress", phase=self._group.phase, **totals)
                next_event = now + _EVENT_INTERVAL_S
            if self._stopping.wait(_FILE_INTERVAL_S):
                return


def _failed(failure: Failure) -> dict[str, object]:
    return {"state": "failed", "exit_code": failure.exit_code, "message": failure.describe()}
