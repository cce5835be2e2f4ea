"""Signals as exceptions, and children that do not outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from dist_export.runtime.failure import TerminatedError

#: linux/prctl.h
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def terminate_cleanly() -> Iterator[None]:
    """SIGTERM and SIGINT raise `TerminatedError` in the main thread, so that clean-up runs. In other threads: nothing.

    After the first signal another SIGTERM changes nothing (clean-up is under way) and a SIGINT kills at once.
    A signal that was ignored before stays ignored (nohup, background jobs). The old handlers come back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    watched = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]

    def on_signal(signal_number: int, _frame: FrameType | None) -> None:
        for each in watched:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGTERM else signal.SIG_DFL)
        raise TerminatedError(signal_number)

    previous = {each: signal.signal(each, on_signal) for each in watched}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def note_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are appended to the yielded list, for a loop that looks at it; a second SIGINT kills.

    For a parent whose bookkeeping must not be interrupted. The main thread calls it; in others nothing is noted.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def on_signal(signal_number: int, _frame: FrameType | None) -> None:
        noted.append(signal_number)
        if signal_number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    watched = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {each: signal.signal(each, on_signal) for each in watched}
    try:
        yield noted
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies (Linux; elsewhere nothing). The forked child calls it first.

    Clean-up may run then, and losing the store ends the process in any case.
    Exits at once if the parent died before the request was made.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(TerminatedError(signal.SIGTERM).exit_code)
