"""A rank's program for the tests: `rank_program.py local N SCENARIO` forks N ranks, `… here SCENARIO` is one rank.

Prints `rank R did X` lines, so that tests see what happened where.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable

import numpy as np

from dist_export.errors import ExportError
from dist_export.runtime.group import Group
from dist_export.runtime.launch import run_local
from dist_export.runtime.monitor import Timing
from dist_export.runtime.run import run_here
from dist_export.runtime.world import detect_world


def say(group: Group, text: str) -> None:
    """One line in one write, so that lines of several ranks do not mix."""
    os.write(1, f"rank {group.rank} {text}\n".encode())


def exchange(group: Group) -> int:
    """Values of every size come back in rank order, and everyone gets rank 0's."""
    for size in (0, 5, (4 << 20) - 1, 4 << 20, 20_000_000):  # a value of the store takes 4 MiB
        step = f"{size} bytes"
        gathered = group.gather(step, bytes([group.rank]) * size)
        if group.rank == 0:
            assert gathered == [bytes([rank]) * size for rank in range(group.world_size)], step
        else:
            assert gathered is None
        expected = bytes(range(250)) * (size // 250)
        assert group.broadcast(step, expected if group.rank == 0 else None) == expected
    group.barrier("done")
    say(group, "exchanged")
    return 0


def maxima(group: Group) -> int:
    """Every rank gets the maximum of all ranks' arrays, bit for bit, however many ranks share the values."""
    everything = np.random.default_rng(7).normal(size=(2, 3, 500_000)).astype(np.float32)  # 12 MB
    everything.flat[:3] = (np.nan, np.inf, -0.0)
    mine = np.where(np.arange(everything.size) % group.world_size == group.rank, everything.ravel(), np.float32("-inf"))
    kept = mine.copy()
    result = group.all_reduce_max(mine.reshape(everything.shape))
    assert result.dtype == np.float32 and result.shape == everything.shape
    everything.flat[2] = 0.0
    assert result.tobytes() == everything.tobytes()
    assert mine.tobytes() == kept.tobytes(), "the argument has changed"
    scalar = group.all_reduce_max(np.array(group.rank, np.float32), step="rank")
    assert scalar.shape == () and scalar == group.world_size - 1
    assert group.all_reduce_max(np.zeros((0, 4), np.float32), step="empty").shape == (0, 4)
    say(group, "reduced")
    return 0


def barriers(group: Group) -> int:
    """Nobody passes a barrier before everybody reached it."""
    for number in range(3):
        arrived = time.monotonic()
        if group.rank == group.world_size - 1:
            time.sleep(0.2)
            arrived = time.monotonic()
        group.barrier(f"number {number}")
        passed = time.monotonic()
        times = group.gather(f"times {number}", f"{arrived} {passed}".encode())
        if times is not None:
            rows = [tuple(map(float, each.split())) for each in times]
            assert max(row[0] for row in rows) <= min(row[1] for row in rows)
    say(group, "passed")
    return 0


def rank_1_bad_input(group: Group) -> int:
    """An ExportError of one rank while the others wait."""
    if group.rank == 1:
        raise ExportError("model.safetensors: tensor 'x' is cut off")
    group.barrier("never")
    return 0


def rank_1_bug(group: Group) -> int:
    """An unexpected exception of one rank while the others compute and check now and then."""
    if group.rank == 1:
        raise KeyError("unexpected")
    while True:
        group.check()
        time.sleep(0.01)


def wait_for_ever(group: Group) -> int:
    """Rank 0 says all process ids and everyone waits for what never comes."""
    pids = group.gather("pids", str(os.getpid()).encode())
    if pids is not None:
        say(group, "pids " + b" ".join(pids).decode())
    if group.rank == 0:
        while True:
            group.check()
            time.sleep(0.01)
    group.broadcast("never")
    return 0


def rank_1_killed(group: Group) -> int:
    """SIGKILL of a rank while the others wait in a barrier."""
    group.barrier("started")
    if group.rank == 1:
        say(group, f"dies at {time.monotonic()}")
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier("never")
    return 0


def rank_0_killed(group: Group) -> int:
    """SIGKILL of rank 0, which may host the store."""
    group.barrier("started")
    if group.rank == 0:
        time.sleep(0.3)
        say(group, f"dies at {time.monotonic()}")
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier("never")
    return 0


def rank_1_stopped(group: Group) -> int:
    """A rank that stalls as a whole."""
    group.barrier("started")
    if group.rank == 1:
        say(group, f"dies at {time.monotonic()}")
        os.kill(os.getpid(), signal.SIGSTOP)
    group.barrier("never")
    return 0


def rank_1_stuck(group: Group) -> int:
    """A rank whose work hangs while its heartbeat goes on; rank 2 makes progress for a while."""
    group.barrier("started")
    if group.rank == 1:
        time.sleep(600)
    if group.rank == 2:
        for _ in range(20):
            group.progress.add(bytes_written=1)
            time.sleep(0.1)
        say(group, "finished")
    group.barrier("late")
    return 0


def killed_beside_stuck(group: Group) -> int:
    """One rank is killed, another neither checks nor listens to SIGTERM."""
    group.barrier("started")
    if group.rank == 1:
        say(group, f"dies at {time.monotonic()}")
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(600)
    return 0


def silent_exit(group: Group) -> int:
    """A rank whose process ends without a word, as native code can make it."""
    group.barrier("started")
    if group.rank == 1:
        os._exit(0)
    group.barrier("never")
    return 0


def return_code(group: Group) -> int:
    """Codes that ranks return by themselves."""
    return 7 if group.rank == 1 else 0


def buffered_output(group: Group) -> int:
    """Text that is buffered at the fork appears once."""
    sys.stdout.write(f"rank {group.rank} printed\n")
    return 0


def clean_up(group: Group) -> int:
    """Clean-up runs on SIGTERM and SIGINT."""
    try:
        return wait_for_ever(group)
    finally:
        say(group, "cleaned up")


def slow(group: Group) -> int:
    """Ranks that are at work for a while without exchanging anything."""
    group.barrier("started")
    for _ in range(20):
        time.sleep(0.1)
        group.check()
    group.barrier("ended")
    return 0


def long_message(group: Group) -> int:
    """A message longer than the store takes."""
    if group.rank == 1:
        raise ExportError("start " + "ü" * 10_000_000 + " end")
    group.barrier("never")
    return 0


def progress(group: Group) -> int:
    """Rank 0 sees the sum of all ranks' counters."""
    group.show_progress()
    group.progress.add(bytes_read=1, bytes_written=10 * group.rank, total=100)
    while group.rank == 0 and group.job_progress().total < 100 * group.world_size:
        group.check()
        time.sleep(0.01)
    group.barrier("shown")
    if group.rank == 0:
        counts = group.job_progress()
        say(group, f"sees {counts.bytes_read} {counts.bytes_written} {counts.total}")
    return 0


SCENARIOS: dict[str, Callable[[Group], int]] = {
    function.__name__: function
    for function in (
        exchange, maxima, barriers, rank_1_bad_input, rank_1_bug, wait_for_ever, rank_1_killed, rank_0_killed,
        rank_1_stopped, rank_1_stuck, killed_beside_stuck, silent_exit, return_code, buffered_output, clean_up,
        slow, long_message, progress,
    )
}  # fmt: skip

#: Faster than in use, so that the tests are.
FAST = Timing(timeout_s=1.5, heartbeat_s=0.25, lost_after_s=2.5, leave_within_s=2.0)


def main() -> int:
    """Run as the arguments say."""
    mode, *arguments = sys.argv[1:]
    scenario = SCENARIOS[arguments[-1]]
    timing = Timing() if os.environ.get("REAL_TIMING") else FAST
    if os.environ.get("NO_PIDFD"):
        os.pidfd_open = _refused
    if mode == "local":
        sys.stdout.write("before the fork\n")
        return run_local(int(arguments[0]), scenario, timing=timing)
    return run_here(detect_world(os.environ), scenario, timing=timing)


def _refused(pid: int, flags: int = 0) -> int:
    raise OSError(errno.ENOSYS, f"no descriptor of process {pid}")


if __name__ == "__main__":
    sys.exit(main())
