"""Groups of threads over one store in memory: the exchange, and the failures that need exact timing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from dist_export.errors import ExportError
from dist_export.runtime.failure import MAX_MESSAGE, Failure, PeerFailedError, TerminatedError
from dist_export.runtime.group import Group
from dist_export.runtime.monitor import Timing
from dist_export.runtime.signals import terminate_cleanly
from dist_export.runtime.store import MemoryStore
from dist_export.runtime.world import World

FAST = Timing(timeout_s=5.0, heartbeat_s=0.05, lost_after_s=0.5, leave_within_s=60.0)


def make_group(store: MemoryStore, rank: int, size: int, reports: list[Failure]) -> Group:
    """Rank `rank` of `size`, in a thread."""
    return Group(World(rank, size, rank, size, 0, "local"), store, timing=FAST, report=reports.append)


def run_threads(size: int, main: Callable[[Group], None]) -> tuple[list[BaseException | None], list[Failure]]:
    """Run `main` as `size` ranks; returns what each raised and all reports."""
    store, reports = MemoryStore(), list[Failure]()
    raised: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            with make_group(store, rank, size, reports) as group:
                main(group)
        except (Exception, TerminatedError) as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return raised, reports


def test_gathered_values_are_consumed_in_rank_order_and_forgotten() -> None:
    store, consumed = MemoryStore(), list[tuple[int, bytes]]()
    groups = [make_group(store, rank, 3, []) for rank in range(3)]
    for rank in (2, 1, 0):
        groups[rank].gather_each("fragments", b"%d" % rank, lambda rank, value: consumed.append((rank, value)))
    assert consumed == [(0, b"0"), (1, b"1"), (2, b"2")]
    assert store.get("gather/fragments/1") is None


def test_the_first_failure_wins_and_is_reported_once() -> None:
    def main(group: Group) -> None:
        if group.rank:
            group.barrier("all but rank 0")  # never complete
        raise ExportError("of rank 0")

    raised, reports = run_threads(8, main)
    assert isinstance(raised[0], ExportError)
    for error in raised[1:]:
        assert isinstance(error, PeerFailedError)
        assert (error.rank, error.message, str(error)) == (0, "of rank 0", "rank 0: of rank 0")
    assert reports == [Failure(0, "input", "of rank 0", 0)]


def test_many_failures_at_once_are_reported_once() -> None:
    def main(group: Group) -> None:
        raise ExportError(f"of rank {group.rank}")

    raised, reports = run_threads(8, main)
    assert [str(error) for error in raised] == [f"of rank {rank}" for rank in range(8)]
    assert len(reports) == 1


def test_a_failure_after_the_others_are_done_fails_them_too() -> None:
    def main(group: Group) -> None:
        if group.rank == 2:
            time.sleep(0.2)
            raise ExportError("late")

    raised, reports = run_threads(3, main)
    assert [type(error) for error in raised] == [PeerFailedError, PeerFailedError, ExportError]
    assert len(reports) == 1


def test_check_sees_a_failure_without_waiting() -> None:
    store = MemoryStore()
    with pytest.raises(PeerFailedError, match="rank 1: posted by hand"), make_group(store, 0, 2, []) as watching:
        watching.check()
        make_group(store, 1, 2, []).fail(ExportError("posted by hand"))
        begun = time.monotonic()
        while time.monotonic() < begun + 1:
            watching.check()
    assert watching.failure == Failure(1, "input", "posted by hand", 1)
    with pytest.raises(PeerFailedError):
        watching.barrier("after a failure")


def test_a_rank_that_starts_late_is_not_lost() -> None:
    def main(group: Group) -> None:
        group.barrier("all there")

    store, reports = MemoryStore(), list[Failure]()

    def run(rank: int) -> None:
        time.sleep(1.0 * rank)  # twice the time after which a silent rank is lost
        with make_group(store, rank, 2, reports) as group:
            main(group)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert reports == []


def test_a_terminated_rank_blames_a_silent_one() -> None:
    def main(group: Group) -> None:
        group.barrier("started")
        if group.rank == 2:
            group._monitor._stopping.set()  # its heartbeat stops, as if it were killed
            time.sleep(1.5)
            return
        time.sleep(0.1)
        raise TerminatedError(signal.SIGTERM)

    _raised, reports = run_threads(3, main)
    [failure] = reports  # told once, by whichever of the terminated ranks was first
    assert failure == Failure(2, "lost", "stopped responding (killed?)", failure.reporter)


def test_terminated_ranks_report_the_signal_where_all_respond() -> None:
    def main(group: Group) -> None:
        group.barrier("started")
        raise TerminatedError(signal.SIGTERM)

    _raised, reports = run_threads(3, main)
    assert [(failure.kind, failure.message) for failure in reports] == [("terminated", "stopped by SIGTERM")]


def test_a_step_is_used_once() -> None:
    group = Group.single()
    group.broadcast("plan", b"x")
    with pytest.raises(AssertionError, match="used twice"):
        group.broadcast("plan", b"x")


def test_a_failure_survives_the_crossing() -> None:
    failure = Failure.of(3, ExportError("größe \ud800 of 'x'"))
    assert Failure.decode(failure.encode()) == failure
    long = Failure.decode(Failure(0, "internal", "a" * 3 * MAX_MESSAGE + "end", 0).encode())
    assert long.message.endswith("end") and len(long.message) < 1.1 * MAX_MESSAGE
    with pytest.raises(ValueError, match="not a failure record"):
        Failure.decode(b'{"kind": "other"}')


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_become_exceptions_and_handlers_come_back(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(TerminatedError) as caught, terminate_cleanly():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # clean-up is not interrupted by another one
    assert caught.value.exit_code == caught.value.code == code
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with terminate_cleanly():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
