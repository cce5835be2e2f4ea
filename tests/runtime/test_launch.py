"""Forked ranks: real processes that exchange, fail, die and stall."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import PROGRAM, Ended, finish, local_command, run_forked, start

from dist_export.errors import ExportError
from dist_export.runtime.group import Group
from dist_export.runtime.launch import run_local


def errors(ended: Ended) -> list[str]:
    """The causes printed."""
    return [line for line in ended.err.splitlines() if line.startswith("dist-export: ")]


@pytest.mark.parametrize("num_processes", [1, 3])
def test_values_of_every_size_are_exchanged(num_processes: int) -> None:
    ended = run_forked(num_processes, "exchange")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("exchanged") == num_processes


def test_a_kernel_that_tells_of_no_ended_process() -> None:
    """Before Linux 5.3, and in some sandboxes: the launcher looks for them."""
    ended = run_forked(3, "exchange", NO_PIDFD="1")
    assert (ended.code, ended.err, ended.out.count("exchanged")) == (0, "", 3)
    killed = run_forked(3, "rank_1_killed", NO_PIDFD="1")
    assert killed.code == 3 and "rank 1 was killed by signal 9" in killed.err


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_maxima_do_not_depend_on_the_number_of_processes(num_processes: int) -> None:
    ended = run_forked(num_processes, "maxima")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("reduced") == num_processes


def test_32_ranks_pass_barriers_together() -> None:
    ended = run_forked(32, "barriers")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("passed") == 32


def test_an_export_error_ends_all_ranks_and_is_printed_once() -> None:
    ended = run_forked(4, "rank_1_bad_input")
    assert ended.err == "dist-export: error: rank 1: model.safetensors: tensor 'x' is cut off\n"
    assert ended.code == 2
    assert ended.seconds < 5


def test_a_bug_is_printed_once_with_the_traceback_of_its_rank() -> None:
    ended = run_forked(4, "rank_1_bug")
    assert errors(ended) == ["dist-export: internal error: rank 1: Traceback (most recent call last):"]
    assert ended.err.count("KeyError: 'unexpected'") == 1
    assert ended.code == 1
    assert ended.seconds < 5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_ranks_at_once(rank: int) -> None:
    ended = run_forked(4, f"rank_{rank}_killed", REAL_TIMING="1")
    assert ended.err == f"dist-export: error: rank {rank} was killed by signal 9 (SIGKILL); out of memory?\n"
    assert ended.code == 3
    assert ended.seconds < 5


def test_a_rank_that_does_not_listen_is_ended_after_a_failure() -> None:
    ended = run_forked(4, "killed_beside_stuck", REAL_TIMING="1")
    assert errors(ended) == ["dist-export: error: rank 1 was killed by signal 9 (SIGKILL); out of memory?"]
    assert ended.code == 3
    assert ended.seconds < 10


def test_a_stalled_rank_is_noticed_within_seconds() -> None:
    ended = run_forked(3, "rank_1_stopped", REAL_TIMING="1")
    assert ended.err == "dist-export: error: rank 1 stopped responding (killed?)\n"
    assert ended.code == 3
    assert ended.seconds < 12


def test_a_wait_without_progress_ends_and_names_the_late_rank() -> None:
    ended = run_forked(3, "rank_1_stuck")
    assert ended.out.count("rank 2 finished") == 1  # progress elsewhere kept the others waiting
    assert errors(ended) == [
        "dist-export: error: rank 1 did not reach step 'late/arrived' although no rank made progress for 2 s"
    ]
    assert ended.code == 3


def test_a_rank_that_ends_without_a_word_is_a_failure() -> None:
    ended = run_forked(3, "silent_exit")
    assert ended.err == "dist-export: error: rank 1 ended with exit code 0 before it had finished\n"
    assert ended.code == 3


def test_the_code_that_a_rank_returns_is_the_runs() -> None:
    assert run_forked(3, "return_code").code == 7


def test_a_message_of_any_length_arrives_shortened() -> None:
    ended = run_forked(2, "long_message")
    assert ended.err.startswith("dist-export: error: rank 1: start üüü")
    assert ended.err.endswith("üüü end\n")
    assert "characters left out" in ended.err
    assert len(ended.err) < 100_000


def test_output_buffered_at_the_fork_is_written_once() -> None:
    ended = run_forked(3, "buffered_output")
    assert sorted(ended.out.splitlines()) == ["before the fork", *(f"rank {rank} printed" for rank in range(3))]


def test_progress_of_all_ranks_is_summed() -> None:
    ended = run_forked(3, "progress")
    assert (ended.code, ended.err) == (0, "")
    assert "rank 0 sees 3 30 300\n" in ended.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_parent_stops_all_ranks_cleanly(number: signal.Signals, code: int) -> None:
    process, _pids = _started("clean_up")
    process.send_signal(number)
    ended = finish(process)
    assert ended.err == f"dist-export: error: stopped by {number.name}\n"
    assert ended.code == code
    assert ended.out.count("cleaned up") == 3
    assert ended.seconds < 3


def test_an_interrupt_from_the_keyboard_reaches_all_processes_and_is_reported_once() -> None:
    process, _pids = _started("clean_up")
    os.killpg(process.pid, signal.SIGINT)
    ended = finish(process)
    assert (ended.code, ended.err) == (130, "dist-export: error: stopped by SIGINT\n")
    assert ended.out.count("cleaned up") == 3


def test_ranks_do_not_outlive_the_parent(tmp_path: Path) -> None:
    process, pids = _started("clean_up", TMPDIR=str(tmp_path))
    process.kill()
    ended = finish(process)  # the ranks hold its output: the end of it is theirs
    assert ended.code == -signal.SIGKILL
    assert ended.seconds < 5
    time.sleep(0.5)  # a process closes its files shortly before it is gone
    assert not any(_is_alive(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_in_the_temporary_folder(tmp_path: Path) -> None:
    for scenario in ("buffered_output", "rank_1_killed"):
        run_forked(2, scenario, TMPDIR=str(tmp_path))
        assert list(tmp_path.iterdir()) == []


def test_one_process_runs_in_the_caller() -> None:
    pids = []

    def main(group: Group) -> int:
        pids.append(os.getpid())
        assert (group.rank, group.world_size, group.gather("all", b"x")) == (0, 1, [b"x"])
        return 5

    assert run_local(1, main) == 5
    assert pids == [os.getpid()]


def test_one_process_reports_without_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    def main(group: Group) -> int:
        raise ExportError("no such folder")

    assert run_local(1, main) == 2
    assert capsys.readouterr().err == "dist-export: error: no such folder\n"


def test_no_processes_is_an_error() -> None:
    with pytest.raises(ExportError, match="must be at least 1, not 0"):
        run_local(0, lambda group: 0)


def test_the_runtime_starts_without_torch() -> None:
    code = "import sys, dist_export.runtime.launch, dist_export.runtime.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROGRAM.parents[2])


def test_a_job_that_is_suspended_as_a_whole_goes_on_afterwards() -> None:
    process = start(*local_command(3, "slow"))
    time.sleep(0.8)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(3.0)  # longer than the time after which a silent rank is lost
    os.killpg(process.pid, signal.SIGCONT)
    ended = finish(process)
    assert (ended.code, ended.err) == (0, "")


def _is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _started(scenario: str, **extra: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Three ranks that wait for ever, and their process ids."""
    process = start(*local_command(3, scenario), **extra)
    assert process.stdout is not None
    line = ""
    while "pids" not in line:
        line = process.stdout.readline()
        assert line, "ended early"
    time.sleep(0.2)
    return process, [int(pid) for pid in line.split()[3:]]
