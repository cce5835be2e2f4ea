"""Watches over the other ranks: heartbeats, the first failure, and an end for ranks that do not notice it.

Rank 0 observes every rank, every other rank observes rank 0 and the abort key; so a round costs the store a few
requests per rank, however many ranks there are. What rank 0 sees reaches the others through the abort key.
A heartbeat is a counter: the observer's own clock measures how long it has not changed, so clocks need not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

from msgspec import Struct, field

from dist_export.runtime import exit_codes
from dist_export.runtime.failure import Failure, StoreLostError
from dist_export.runtime.progress import Progress, ProgressCounts
from dist_export.runtime.store import Store
from dist_export.runtime.world import World, process_name

ABORT_KEY = "abort"
STOPPED_RESPONDING = "stopped responding (killed?)"
LAUNCHER_GONE = "has lost the launcher's process that started it (killed?)"

#: Seconds between two looks at the abort key by `Monitor.current_failure`, however often it is called.
_ABORT_LOOK_S = 0.2


class Timing(Struct, frozen=True):
    """Time limits of a run, all in seconds.

    `timeout_s`: a wait fails after this long without progress of any rank (bytes counted or steps reached).
    `heartbeat_s`: between two heartbeats. `lost_after_s`: a rank whose heartbeat stands still this long is lost.
    `leave_within_s`: a rank that knows of a failure and is still at work this much later ends at once.
    `linger_s`: how long the rank that hosts the store waits for the others to leave before it.
    """

    timeout_s: float = 600.0
    heartbeat_s: float = 1.0
    lost_after_s: float = 8.0
    leave_within_s: float = 5.0
    linger_s: float = 5.0


class _Peer(Struct):
    process: str = ""
    beat: bytes | None = None
    silent_s: float = 0.0
    left: bool = False
    counts: ProgressCounts = field(default_factory=ProgressCounts)


def beat_key(rank: int) -> str:
    """The key of a rank's heartbeat."""
    return f"beat/{rank}"


def has_left(beat: bytes | None) -> bool:
    """Whether a heartbeat is a rank's last one, sent as it left the group in good order."""
    return beat is not None and bool(json.loads(beat)["left"])


class Monitor:
    """The heartbeat thread of a rank and what it knows. Every rank has one, as a part of its `Group`."""

    def __init__(
        self,
        world: World,
        store: Store,
        *,
        progress: Progress,
        timing: Timing,
        report: Callable[[Failure], None] | None,
    ) -> None:
        self.failure: Failure | None = None
        self.last_progress = time.monotonic()
        self._world, self._store, self._progress, self._timing = world, store, progress, timing
        self._report = report
        watched = range(1, world.world_size) if world.rank == 0 else range(1)
        self._peers = {rank: _Peer() for rank in watched}
        self._lock = threading.Lock()
        self._parent, self._process = os.getppid(), process_name(os.getpid())
        self._beats = 0
        self._job_bytes = (0, 0)
        self._failed_at = self._looked_at = self._observed_at = time.monotonic()
        self._leaving = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Send the first heartbeat and start the thread. Raises StoreLostError."""
        self._send_beat()
        self._thread.start()

    def begin_to_leave(self) -> None:
        """From now on this rank is leaving; its thread no longer ends it for taking long."""
        self._leaving.set()

    def stop(self) -> None:
        """Stop the thread, say goodbye, and wait as the store's host until the others have left or a limit."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(self._timing.leave_within_s)
        self._end_silent_neighbour()
        with contextlib.suppress(StoreLostError):
            self._send_beat(left=True)
            if self._store.host_rank == self._world.rank:
                self._linger()

    def post(self, failure: Failure) -> Failure:
        """Make `failure` the run's, unless there is one; returns the run's. Keeps `failure` where the store is gone."""
        try:
            stored = Failure.decode(self._store.set_once(ABORT_KEY, failure.encode()))
        except StoreLostError:
            stored = failure
        return self._learn(stored)

    def learn_store_lost(self, lost: StoreLostError) -> Failure:
        """The store is gone: nobody can agree who reports it, so the lowest rank that can be alive does."""
        reporter = 1 if lost.rank == 0 else 0
        return self._learn(Failure(lost.rank, "lost", lost.message, reporter))

    def current_failure(self) -> Failure | None:
        """What is known, with a look at the abort key now and then. Raises StoreLostError."""
        now = time.monotonic()
        if self.failure is None and now - self._looked_at >= _ABORT_LOOK_S and self._peers:
            self._looked_at = now
            self.look_for_abort()
        return self.failure

    def look_for_abort(self) -> Failure | None:
        """Read the abort key now. Raises StoreLostError."""
        stored = self._store.get(ABORT_KEY)
        return self.failure if stored is None else self._learn(Failure.decode(stored))

    def report_once(self) -> None:
        """Report the run's failure if that is this rank's task and has not been done."""
        with self._lock:
            report, failure = self._report, self.failure
            if failure is None or report is None or failure.reporter != self._world.rank:
                return
            self._report = None
        report(failure)

    def job_counts(self) -> ProgressCounts:
        """Rank 0: the counters of all ranks together, others' as of their last heartbeat."""
        return ProgressCounts.sum([self._progress.counts(), *(peer.counts for peer in self._peers.values())])

    def cause_of_termination(self, own: Failure) -> Failure:
        """Why this rank got SIGTERM: `own`, unless the launcher answered the death of another rank with it.

        Rank 0 sees within a few heartbeats whether a rank is silent; another rank looks at those of its node, since a
        launcher with an agent per node tells them first, and waits for what rank 0 posts. Raises StoreLostError.
        """
        deadline = time.monotonic() + 3 * self._timing.heartbeat_s
        watched = list(self._peers) if self._world.rank == 0 else self._neighbours()
        silent = [] if self.look_for_abort() else self._silent(watched, 2.5 * self._timing.heartbeat_s)
        while self._world.rank != 0 and not silent and time.monotonic() < deadline:
            if self.look_for_abort():
                break
            time.sleep(0.05)
        lost = Failure(silent[0], "lost", STOPPED_RESPONDING, self._world.rank) if silent else None
        return self.failure or lost or own

    def _neighbours(self) -> list[int]:
        """The other ranks of this node where a node's ranks are numbered in one go, as torchrun does."""
        first = self._world.rank - self._world.local_rank
        last = min(first + self._world.local_world_size, self._world.world_size)
        return [rank for rank in range(max(first, 0), last) if rank != self._world.rank]

    def _silent(self, watched: Sequence[int], wait_s: float) -> list[int]:
        """Those of the ranks that give no sign of life within `wait_s`; returns as soon as all did."""
        before = {rank: self._store.get(beat_key(rank)) for rank in watched}
        silent = [rank for rank, beat in before.items() if beat is not None and not has_left(beat)]
        deadline = time.monotonic() + wait_s
        while silent and time.monotonic() < deadline:
            time.sleep(0.05)
            silent = [rank for rank in silent if self._store.get(beat_key(rank)) == before[rank]]
        return silent

    def _run(self) -> None:
        pause = self._timing.heartbeat_s / 5  # soon, so that every rank knows the watched ones' processes
        while not self._stopping.wait(pause):
            pause = self._timing.heartbeat_s
            try:
                self._send_beat()
                if self.failure is None and self.look_for_abort() is None:
                    self._observe()
                    self._look_for_launcher()
            except StoreLostError as lost:
                self.learn_store_lost(lost)
            except Exception as error:  # an unwatched rank could hang: a bug here must end it like any other
                self._learn(Failure.of(self._world.rank, error))
            self._end_if_stuck()

    def _send_beat(self, *, left: bool = False) -> None:
        self._beats += 1
        counts = self._progress.counts()
        record = {
            "beat": self._beats,
            "process": self._process,
            "left": left,
            "counts": [counts.bytes_read, counts.bytes_written, counts.total],
            "job": self._job_bytes,
        }
        self._store.set(beat_key(self._world.rank), json.dumps(record).encode("ascii"))

    def _observe(self) -> None:
        now = time.monotonic()
        # Time in which this process itself did not run (stopped, suspended) must not count against the others.
        elapsed = min(now - self._observed_at, 2 * self._timing.heartbeat_s)
        self._observed_at = now
        job_bytes = (0, 0)
        for rank, peer in self._peers.items():
            published = self._observe_peer(rank, peer, elapsed)
            job_bytes = max(job_bytes, published)
        job = self.job_counts()
        job_bytes = max(job_bytes, (job.bytes_read, job.bytes_written))
        if job_bytes != self._job_bytes:
            self._job_bytes, self.last_progress = job_bytes, now

    def _observe_peer(self, rank: int, peer: _Peer, elapsed: float) -> tuple[int, int]:
        """Bring `peer` up to date; returns the job's (bytes read, bytes written) as that rank knows them."""
        beat = None if peer.left else self._store.get(beat_key(rank))
        if beat is None:  # not started yet, or gone in good order
            return (0, 0)
        if beat == peer.beat:
            peer.silent_s += elapsed
            if peer.silent_s > self._timing.lost_after_s:
                self.post(Failure(rank, "lost", STOPPED_RESPONDING, self._world.rank))
            return (0, 0)
        record = json.loads(beat)
        peer.beat, peer.silent_s, peer.left = beat, 0.0, record["left"]
        peer.counts, peer.process = ProgressCounts(*record["counts"]), record["process"]
        return (record["job"][0], record["job"][1])

    def _look_for_launcher(self) -> None:
        """Fail where the launcher has died that started this process: nobody else would end it."""
        if self._world.launcher not in ("single", "local") and os.getppid() != self._parent:
            self.post(Failure(self._world.rank, "lost", LAUNCHER_GONE, self._world.rank))

    def _learn(self, failure: Failure) -> Failure:
        with self._lock:
            if self.failure is None:
                self.failure, self._failed_at = failure, time.monotonic()
            return self.failure

    def _end_if_stuck(self) -> None:
        """End the process where its main thread works on although the run has failed.

        It may sit in a system call that no signal interrupts; waiting for it would let the whole job hang.
        """
        alone = not self._peers
        if alone or self.failure is None or self._leaving.is_set():
            return
        if time.monotonic() - self._failed_at > self._timing.leave_within_s:
            self.report_once()
            self._end_silent_neighbour()
            os._exit(exit_codes.PEER_FAILED)

    def _end_silent_neighbour(self) -> None:
        """Kill the rank that stopped responding where it is a process of this machine: it would outlive the run.

        A stopped process does not react to the SIGTERM of its launcher, and some launchers wait for it for ever.
        """
        failure = self.failure
        if failure is None or failure.rank in (-1, self._world.rank):
            return
        if failure.kind != "lost" or not failure.message.startswith(STOPPED_RESPONDING):
            return  # it can tell its failure and leave by itself
        peer = self._peers.get(failure.rank)
        process = peer.process if peer is not None else ""
        if not process:
            with contextlib.suppress(StoreLostError):
                beat = self._store.get(beat_key(failure.rank))
                process = "" if beat is None or has_left(beat) else json.loads(beat)["process"]
        pid = int(process.rpartition("/")[2] or 0)
        if pid and process != self._process and process_name(pid) == process:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _linger(self) -> None:
        """Keep the store for the others until they have read why the run ends, and left."""
        dead = self.failure.rank if self.failure is not None and self.failure.kind == "lost" else None
        waiting = [rank for rank in range(self._world.world_size) if rank not in (dead, self._world.rank)]
        deadline = time.monotonic() + self._timing.linger_s
        while waiting and time.monotonic() < deadline:
            waiting = [rank for rank in waiting if not has_left(self._store.get(beat_key(rank)))]
            time.sleep(0.01)
