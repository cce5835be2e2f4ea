"""Leases between real processes: dead owners are found at once, of several takers one wins, and renewals never
reach a successor."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_export.errors import ExportError
from dist_export.runtime.lease import NAME, RENEW_S, Lease, is_held, leases


def forked(work: Callable[[], int]) -> int:
    """The id of a process that does `work` and exits with what it returns."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return pid


def die_holding(folder: Path) -> None:
    """Leave the lease of a killed process of this machine."""

    def work() -> int:
        Lease.acquire(folder)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert os.waitpid(forked(work), 0)[1] == signal.SIGKILL


def foreign(folder: Path, name: str = NAME, **changes: object) -> Path:
    """The lease of a process on another machine."""
    content = {"token": "abc", "host": "elsewhere", "boot": "x", "pid": os.getpid(), "started": 1, "beat": 0}
    part = folder / "part"
    part.write_text(json.dumps(content | changes))
    return part.replace(folder / name)  # at once, as a lease is written: nobody reads half of one


def test_a_free_folder_is_taken_and_given_back(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path)
    assert lease.is_held(tmp_path) and is_held(tmp_path)
    lease.check(tmp_path)
    lease.release(tmp_path)
    lease.release(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not is_held(tmp_path)


def test_a_living_owner_of_this_machine_is_named(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path)
    begun = time.monotonic()
    with pytest.raises(ExportError, match=rf"another export to this output is running \(process {os.getpid()} on "):
        Lease.acquire(tmp_path)
    assert time.monotonic() - begun < 0.2
    lease.check(tmp_path)
    lease.release(tmp_path)


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_of_this_machine_is_dead_at_once(reaped: bool, tmp_path: Path) -> None:
    def work() -> int:
        Lease.acquire(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    pid = forked(work)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie
    if reaped:
        os.waitpid(pid, 0)
    begun = time.monotonic()
    lease = Lease.acquire(tmp_path)
    assert time.monotonic() - begun < 0.2
    assert leases(tmp_path) == [tmp_path / f"{NAME}.1"]
    lease.release(tmp_path)
    if not reaped:
        os.waitpid(pid, 0)


def test_a_later_process_with_the_number_of_the_owner_is_not_the_owner(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path)
    content = json.loads((tmp_path / NAME).read_text())
    lease.release(tmp_path)
    (tmp_path / NAME).write_text(json.dumps(content | {"started": content["started"] + 1}))
    assert not is_held(tmp_path)


def test_the_same_name_in_another_container_is_judged_by_its_renewals(tmp_path: Path) -> None:
    """Containers share host name and boot, and number processes on their own."""
    lease = Lease.acquire(tmp_path)
    content = json.loads((tmp_path / NAME).read_text())
    lease.release(tmp_path)
    (tmp_path / NAME).write_text(json.dumps(content | {"boot": content["boot"] + "1", "pid": 1 << 30}))
    begun = time.monotonic()
    assert not is_held(tmp_path, stale_after_s=0.6)
    assert time.monotonic() - begun >= 0.6


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": "x"}'])
def test_an_unreadable_lease_is_waited_for_and_then_dead(content: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(content)
    Lease.acquire(tmp_path, stale_after_s=0.3).release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_another_machine(tmp_path: Path) -> None:
    path = foreign(tmp_path)

    def renew() -> int:
        for beat in range(1, 40):
            foreign(tmp_path, beat=beat)
            time.sleep(0.1)
        return 0

    renewing = forked(renew)
    with pytest.raises(ExportError, match=r"is running \(process \d+ on elsewhere\); wait for it, stop it, or choose"):
        Lease.acquire(tmp_path, stale_after_s=3)
    os.kill(renewing, signal.SIGKILL)
    os.waitpid(renewing, 0)
    lease = Lease.acquire(tmp_path, stale_after_s=0.5)
    assert not path.exists()
    lease.check(tmp_path)
    lease.release(tmp_path)


def test_what_a_run_left_that_died_taking_over_is_removed(tmp_path: Path) -> None:
    foreign(tmp_path)
    foreign(tmp_path, f"{NAME}.1")
    lease = Lease.acquire(tmp_path, stale_after_s=0.3)
    assert leases(tmp_path) == [tmp_path / f"{NAME}.2"]
    lease.release(tmp_path)


def test_of_many_that_take_a_dead_lease_at_the_same_time_exactly_one_has_it(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        die_holding(folder)
        assert sorted(take_at_once(folder, 6)) == [0, 1, 1, 1, 1, 1]


def take_at_once(folder: Path, num_takers: int) -> list[int]:
    """Exit codes of processes that try to take a lease: 0 of those that have it while all others have given up."""
    begin, end = os.pipe(), os.pipe()

    def take() -> int:
        os.close(begin[1])
        os.close(end[1])
        os.read(begin[0], 1)  # the end of the pipe lets all go at once
        try:
            lease = Lease.acquire(folder)
        except ExportError:
            return 1
        os.read(end[0], 1)
        return 0 if lease.is_held(folder) else 2

    takers = [forked(take) for _ in range(num_takers)]
    os.close(begin[1])
    deadline, codes = time.monotonic() + 15, []
    while len(codes) < num_takers:
        if len(codes) == num_takers - 1 or time.monotonic() > deadline:
            os.close(end[1])
            codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in takers]
            break
        for pid in list(takers):
            if os.waitpid(pid, os.WNOHANG)[0]:
                takers.remove(pid)
                codes.append(1)  # only giving up ends a taker before `end`
        time.sleep(0.002)
    os.close(begin[0])
    os.close(end[0])
    return codes


def test_renewals_follow_the_folder_and_never_touch_a_successor(tmp_path: Path) -> None:
    folder, moved = tmp_path / "here", tmp_path / "there"
    folder.mkdir()
    lease = Lease.acquire(folder)
    folder.rename(moved)
    folder.mkdir()
    successor = Lease.acquire(folder)
    first = [json.loads((each / NAME).read_text())["beat"] for each in (moved, folder)]
    time.sleep(RENEW_S * 1.5)
    second = [json.loads((each / NAME).read_text())["beat"] for each in (moved, folder)]
    assert [a < b for a, b in zip(first, second, strict=True)] == [True, True]
    lease.check(moved)
    successor.check(folder)
    with pytest.raises(ExportError, match="another export took over this output; this one publishes nothing"):
        lease.check(folder)
    lease.release(folder)  # not its own any more
    successor.check(folder)
    successor.release(folder)
    lease.release(moved)


def test_an_owner_that_slept_notices_that_it_lost_its_lease(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path)
    os.rename(tmp_path / NAME, tmp_path / "gone")
    taken = Lease.acquire(tmp_path)
    time.sleep(RENEW_S * 1.3)
    taken.check(tmp_path)  # no renewal of the first has replaced it
    with pytest.raises(ExportError, match="another export took over"):
        lease.check(tmp_path)
    lease.release(tmp_path)
    taken.check(tmp_path)
    taken.release(tmp_path)


def test_no_permission_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has just started or ended"):
        Lease.acquire(tmp_path / "nowhere")
