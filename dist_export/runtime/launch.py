"""Starts the processes of a run on this machine, without a launcher and without torch."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Mapping

from dist_export.errors import ExportError
from dist_export.runtime import exit_codes
from dist_export.runtime.failure import Failure, TerminatedError
from dist_export.runtime.monitor import ABORT_KEY, Timing, beat_key, has_left
from dist_export.runtime.run import Main, Report, print_failure, run_here, run_rank
from dist_export.runtime.signals import die_with_parent, note_signals, terminate_cleanly
from dist_export.runtime.store import LocalStoreServer
from dist_export.runtime.world import SINGLE, World

#: After a failure the ranks leave by themselves; seconds until SIGTERM, and from then until SIGKILL.
_LEAVE_WITHIN_S, _KILL_AFTER_S = 5.0, 4.0
#: Seconds between two looks at the children.
_LOOK_S = 0.005
#: Children whose end is waited for rather than looked for: descriptors are needed for their connections too.
_MOST_WATCHED = 64


def run_local(
    num_processes: int, main: Main, *, timing: Timing | None = None, tell: Report = print_failure
) -> int:
    """Run `main` in `num_processes` forked processes of this machine and wait for them; returns the exit code.

    With one process `main` runs in the calling process. Otherwise the caller must have no threads and must not have
    imported torch, whose threads do not survive a fork. Called from the main thread. `tell` gets a failure once, here:
    the first cause, with its rank; by default it is printed. Children die with this process.

    Returns:
        0; or the first non-zero code that a rank's `main` returned; or the code of the failure: 2 for an ExportError
        of a rank, 1 for any other exception, 3 for a rank that was killed, 130 and 143 for SIGINT and SIGTERM.

    Raises:
        ExportError: `num_processes` is below 1, or there is no place for a socket.
    """
    if num_processes < 1:
        raise ExportError(f"the number of processes must be at least 1, not {num_processes}")
    if num_processes == 1:
        return run_here(SINGLE, main, timing=timing, tell=tell)
    launcher = _Launcher(num_processes, main, timing)
    try:
        with note_signals() as signals:
            launcher.run(signals)
    finally:
        launcher.close()
    return launcher.conclude(tell)


class _Launcher:
    """The parent of the ranks: forks them, serves their store, watches them, ends them."""

    def __init__(self, num_processes: int, main: Main, timing: Timing | None) -> None:
        self._num_processes, self._main, self._timing = num_processes, main, timing
        self._server = LocalStoreServer()
        self._pid = os.getpid()
        self._running: dict[int, int] = {}  # rank -> process id
        self._endings: dict[int, int] = {}  # rank -> descriptor that becomes readable when the process ends
        self._codes: dict[int, int] = {}  # rank -> exit code
        self._failed_at: float | None = None
        self._signals_sent = 0

    def run(self, signals: list[int]) -> None:
        """Start all ranks and wait until the last has ended; `signals` are those that this process received."""
        self._fork_all()
        self._server.start()
        pause = _LOOK_S * max(1.0, self._num_processes / 32)
        while self._running:
            self._reap()
            if signals:
                self._post(Failure.of(-1, TerminatedError(signals[0])))
            self._press(at_once=bool(signals))
            self._look_away(pause)

    def close(self) -> None:
        """Leave no process and no file behind, whatever happened."""
        self._signal_all(signal.SIGKILL)
        for pid in self._running.values():
            os.waitpid(pid, 0)
        self._running.clear()
        while self._endings:
            os.close(self._endings.popitem()[1])
        self._server.close()

    def conclude(self, tell: Report) -> int:
        """Tell the cause of a failure; returns the exit code of the run."""
        failure = self._failure()
        if failure is not None:
            tell(failure)
            return failure.exit_code
        return next((code for _rank, code in sorted(self._codes.items()) if code != 0), exit_codes.OK)

    def _fork_all(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()  # what is still buffered would be written by every child
        for rank in range(self._num_processes):
            try:
                pid = os.fork()
            except OSError as error:
                message = f"cannot start process {rank + 1} of {self._num_processes}: {error.strerror}; use fewer"
                raise ExportError(message) from error
            if pid == 0:
                self._child(rank)
            self._running[rank] = pid
        self._endings = _endings(self._running)

    def _child(self, rank: int) -> None:
        """The forked process; never returns."""
        code = exit_codes.INTERNAL
        try:
            die_with_parent(self._pid)
            # Ctrl-C reaches the whole foreground group; the parent decides and tells.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            world = World(rank, self._num_processes, rank, self._num_processes, 0, "local")
            with terminate_cleanly():
                code = run_rank(world, self._server.connect_in_child(), self._main, timing=self._timing)
        finally:
            if os.getppid() != self._pid:
                self._server.remove_folder()  # the parent was killed and could not
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _look_away(self, pause: float) -> None:
        """Let `pause` seconds pass, or less where a child ends before."""
        if not self._endings:
            time.sleep(pause if self._running else 0)
            return
        watched = select.poll()
        for descriptor in self._endings.values():
            watched.register(descriptor, select.POLLIN)
        watched.poll(1000 * pause)

    def _reap(self) -> None:
        for rank, pid in list(self._running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended == 0:
                continue
            del self._running[rank]
            if rank in self._endings:
                os.close(self._endings.pop(rank))
            code = self._codes[rank] = os.waitstatus_to_exitcode(status)
            if code < 0:
                self._post(Failure(rank, "lost", _killed_by(-code), -1))
            elif not has_left(self._server.memory.get(beat_key(rank))):
                self._post(Failure(rank, "lost", f"ended with exit code {code} before it had finished", -1))

    def _press(self, *, at_once: bool) -> None:
        """After a failure: the rank that no longer responds is killed, the others have a while to leave.

        With `at_once` SIGTERM goes out without that delay: somebody waits for this process to end.
        """
        failure = self._failure()
        if failure is None:
            return
        now = time.monotonic()
        if self._failed_at is None:
            self._failed_at = now
            if failure.kind == "lost" and failure.rank in self._running:
                os.kill(self._running[failure.rank], signal.SIGKILL)
        first = 0.0 if at_once else _LEAVE_WITHIN_S
        stages = [(first, signal.SIGTERM), (first + _KILL_AFTER_S, signal.SIGKILL)]
        for after, number in stages[self._signals_sent :]:
            if now - self._failed_at >= after:
                self._signal_all(number)
                self._signals_sent += 1

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._running.values():
            os.kill(pid, number)

    def _post(self, failure: Failure) -> None:
        self._server.memory.set_once(ABORT_KEY, failure.encode())

    def _failure(self) -> Failure | None:
        stored = self._server.memory.get(ABORT_KEY)
        return None if stored is None else Failure.decode(stored)


def _endings(running: Mapping[int, int]) -> dict[int, int]:
    """A descriptor per rank that becomes readable when its process ends; none where the kernel has none (Linux 5.3)."""
    opened: dict[int, int] = {}
    try:
        for rank, pid in running.items() if len(running) <= _MOST_WATCHED else ():
            opened[rank] = os.pidfd_open(pid)
    except (AttributeError, OSError):
        for descriptor in opened.values():
            os.close(descriptor)
        return {}
    return opened


def _killed_by(number: int) -> str:
    name = signal.Signals(number).name if number in signal.valid_signals() else "unknown"
    hint = "; out of memory?" if number == signal.SIGKILL else ""
    return f"was killed by signal {number} ({name}){hint}"
