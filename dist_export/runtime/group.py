"""The ranks of a run talking to one another: broadcast, gather, barrier, and failing together."""

from __future__ import annotations

import sys
import threading
import time
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from dist_export.runtime.failure import Failure, PeerFailedError, StoreLostError
from dist_export.runtime.monitor import Monitor, Timing
from dist_export.runtime.progress import Progress, ProgressCounts, ProgressLine
from dist_export.runtime.store import MAX_VALUE, MemoryStore, Store
from dist_export.runtime.world import SINGLE, World

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05

#: The first byte of a stored value: the value follows, or the number of its pieces does.
_WHOLE, _PIECES = b"\0", b"\1"
_PIECE = MAX_VALUE - 1


class Group:
    """All ranks of a run, seen from one of them; used as a context manager by every rank.

    Every exchange has a step name, used once in a run and by all ranks. Any wait raises PeerFailedError within
    seconds when a rank fails, is killed or stops, and fails after `Timing.timeout_s` without progress anywhere.
    Leaving the context with an exception makes it the run's failure, unless there is an earlier one; leaving it
    without waits for all ranks, so either all ranks succeed or none does.
    """

    def __init__(
        self,
        world: World,
        store: Store,
        *,
        timing: Timing | None = None,
        report: Callable[[Failure], None] | None = None,
    ) -> None:
        """`report` is called at most once in the whole run: on the rank that has to print the failure."""
        self.world = world
        self.progress = Progress()
        self.phase = "plan"
        self.on_phase: Callable[[str], None] | None = None
        self._timing = timing or Timing()
        self._store = store
        self._monitor = Monitor(world, store, progress=self.progress, timing=self._timing, report=report)
        self._steps: set[str] = set()
        self._display: _Display | None = None

    @staticmethod
    def single() -> Group:
        """A group of this process alone, for library calls without a launcher."""
        return Group(SINGLE, MemoryStore())

    @property
    def rank(self) -> int:
        """The number of this process, 0 ≤ rank < world_size."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.world.world_size

    @property
    def failure(self) -> Failure | None:
        """Why the run failed, as far as this rank knows."""
        return self._monitor.failure

    def __enter__(self) -> Group:
        try:
            self._monitor.start()
        except StoreLostError as lost:
            self._monitor.learn_store_lost(lost)
            self._monitor.report_once()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            self._leave_after(error) if error is not None else self._leave_together()
        finally:
            self._monitor.begin_to_leave()
            if self._display is not None:
                self._display.close()
            self._monitor.report_once()
            self._monitor.stop()

    def check(self) -> None:
        """Raise PeerFailedError if the run has failed. Cheap: call it between pieces of work."""
        failure = self._monitor.current_failure()
        if failure is not None:
            raise PeerFailedError(failure)

    def fail(self, error: BaseException) -> None:
        """Make this rank's `error` the run's failure, unless there is one; the other ranks stop within seconds."""
        self._monitor.post(Failure.of(self.rank, error))

    def broadcast(self, step: str, value: bytes | None = None) -> bytes:
        """Every rank gets the `value` that rank 0 gives. Any length. Raises PeerFailedError."""
        key = self._new_step("broadcast", step)
        if self.rank == 0:
            assert value is not None, f"rank 0 must give a value in step {step!r}"
            self.check()
            if self.world_size > 1:
                self._put(key, value)
            return value
        return self._take(key, step=step, source=0)

    def gather(self, step: str, value: bytes) -> list[bytes] | None:
        """Rank 0 gets every rank's value in rank order, the others None. Any length. Raises PeerFailedError."""
        values: list[bytes] = []
        self.gather_each(step, value, lambda _rank, each: values.append(each))
        return values if self.rank == 0 else None

    def gather_each(self, step: str, value: bytes, consume: Callable[[int, bytes], None]) -> None:
        """As `gather`, but rank 0 consumes ``(rank, value)`` one after another in rank order and keeps none."""
        key = self._new_step("gather", step)
        self.check()
        if self.rank != 0:
            self._put(f"{key}/{self.rank}", value)
            return
        consume(0, value)
        for rank in range(1, self.world_size):
            consume(rank, self._take(f"{key}/{rank}", step=step, source=rank, delete=True))

    def all_reduce_max(self, array: npt.NDArray[np.float32], *, step: str = "maxima") -> npt.NDArray[np.float32]:
        """The element-wise maximum over all ranks' arrays; all ranks call it and get the same new array.

        `array` has the same shape on every rank, in float32, a few MB at most: it goes through the store and through
        rank 0. NaN in any rank's array gives NaN. The bits do not depend on the number of ranks: -0.0 becomes 0.0, and
        every NaN the same one. Raises PeerFailedError.
        """
        import numpy as np

        assert array.dtype == np.float32, array.dtype
        maxima = np.array(array, order="C")

        def take(rank: int, packed: bytes) -> None:
            if rank == 0:
                return
            data = zlib.decompress(packed)
            assert len(data) == maxima.nbytes, f"step {step!r}: rank {rank} has {len(data)} bytes, not {maxima.nbytes}"
            np.maximum(maxima, np.frombuffer(data, np.float32).reshape(maxima.shape), out=maxima)

        # Packed, since of what many ranks have together each knows a part, and the rest is zeros.
        self.gather_each(step, b"" if self.rank == 0 else zlib.compress(maxima.tobytes(), 1), take)
        maxima += 0.0  # turns -0.0 into 0.0
        maxima[np.isnan(maxima)] = np.nan
        told = self.broadcast(step, maxima.tobytes() if self.rank == 0 else None)
        result: npt.NDArray[np.float32] = np.frombuffer(told, np.float32).reshape(array.shape).copy()
        return result

    def barrier(self, step: str) -> None:
        """Return when every rank has called it. Raises PeerFailedError."""
        self.gather(f"{step}/arrived", b"")
        self.broadcast(f"{step}/go", b"" if self.rank == 0 else None)

    def enter_phase(self, name: str) -> None:
        """This rank goes on to another phase of the work; who watches the run is told on rank 0 (`on_phase`)."""
        self.phase = name
        if self.on_phase is not None:
            self.on_phase(name)

    def job_progress(self) -> ProgressCounts:
        """Rank 0: the progress of all ranks together, at most a heartbeat old."""
        return self._monitor.job_counts()

    def show_progress(self, label: str = "exporting") -> None:
        """Show the job's progress on standard error until the group ends. Does nothing on other ranks than 0."""
        if self.rank == 0 and self._display is None:
            self._display = _Display(ProgressLine(sys.stderr, num_ranks=self.world_size, label=label), self)

    def _new_step(self, kind: str, step: str) -> str:
        key = f"{kind}/{step}"
        assert key not in self._steps, f"step {key!r} is used twice"
        self._steps.add(key)
        return key

    def _put(self, key: str, value: bytes) -> None:
        if len(value) <= _PIECE:
            self._store.set(key, _WHOLE + value)
            return
        num_pieces = -(-len(value) // _PIECE)
        for index in range(num_pieces):
            self._store.set(f"{key}/{index}", value[index * _PIECE : (index + 1) * _PIECE])
        self._store.set(key, _PIECES + b"%d" % num_pieces)

    def _take(self, key: str, *, step: str, source: int, delete: bool = False) -> bytes:
        head = self._wait_for(key, step=step, source=source)
        piece_keys = [f"{key}/{index}" for index in range(int(head[1:]))] if head[:1] == _PIECES else []
        pieces = [self._wait_for(piece_key, step=step, source=source) for piece_key in piece_keys]
        if delete:
            for each in (key, *piece_keys):
                self._store.delete(each)
        return b"".join(pieces) if piece_keys else head[1:]

    def _wait_for(self, key: str, *, step: str, source: int) -> bytes:
        begun, pause = time.monotonic(), _FIRST_PAUSE_S
        while (value := self._store.get(key)) is None:
            self.check()
            self._fail_if_late(begun, step=step, source=source)
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST_PAUSE_S)  # about a sixth of the wait so far
        return value

    def _fail_if_late(self, begun: float, *, step: str, source: int) -> None:
        # Rank 0 knows which rank is late; the others, which wait for rank 0, leave the verdict to it.
        grace = 0.0 if self.rank == 0 else 2 * self._timing.lost_after_s
        if time.monotonic() - max(begun, self._monitor.last_progress) < self._timing.timeout_s + grace:
            return
        message = f"did not reach step {step!r} although no rank made progress for {self._timing.timeout_s:.0f} s"
        raise PeerFailedError(self._monitor.post(Failure(source, "lost", message, self.rank)))

    def _leave_together(self) -> None:
        try:
            self.barrier("end of the run")
        except BaseException as error:
            self._leave_after(error)
            raise

    def _leave_after(self, error: BaseException) -> None:
        """Make sure that the run has a failure: `error`, unless it only tells of another rank's."""
        self._monitor.begin_to_leave()
        if isinstance(error, StoreLostError):
            self._monitor.learn_store_lost(error)
        elif isinstance(error, PeerFailedError):
            self._monitor.post(error.failure)
        else:
            self._monitor.post(self._cause_of(error))

    def _cause_of(self, error: BaseException) -> Failure:
        """`error` itself; but launchers answer the death of one rank with SIGTERM to the rest: then that death."""
        own = Failure.of(self.rank, error)
        if own.kind != "terminated":
            return own
        try:
            return self._monitor.cause_of_termination(own)
        except StoreLostError as lost:
            return self._monitor.learn_store_lost(lost)


class _Display:
    """The thread that shows progress: not the heartbeat's, because a stopped terminal blocks whoever writes to it."""

    def __init__(self, line: ProgressLine, group: Group) -> None:
        self._line = line
        self._group = group
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause = 1.5  # by then all ranks' first heartbeats are in, and the total is the whole
        while not self._stopping.wait(pause):
            pause = 0.5
            self._line.update(self._group.job_progress())

    def close(self) -> None:
        """Erase the line; gives up on a terminal that takes no output."""
        self._stopping.set()
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._line.close()
