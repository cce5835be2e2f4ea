"""Ranks that others start: torchrun, and bare processes with srun's variables (rank 0 hosts the store)."""

from __future__ import annotations

import socket

import pytest
from programs import Ended, finish, run_srun_like, run_torchrun, start_srun_like

pytest.importorskip("torch")


def errors(text: str) -> list[str]:
    """The causes printed."""
    return [line for line in text.splitlines() if line.startswith("dist-export: ")]


def of_ranks(ended: list[Ended]) -> tuple[list[int], list[str], float]:
    """Exit codes by rank, causes printed by all ranks together, seconds until the last was gone."""
    killed = [each.since for each in ended if " dies at " in each.out] or [ended[0].since]
    causes = errors("".join(each.err for each in ended))
    return [each.code for each in ended], causes, max(each.until for each in ended) - killed[0]


def test_torchrun_exchanges_values_of_every_size() -> None:
    ended = run_torchrun(2, "exchange")
    assert (ended.code, ended.out.count("exchanged")) == (0, 2), ended.err


@pytest.mark.parametrize("num_processes", [2, 4])
def test_torchrun_reduces_maxima(num_processes: int) -> None:
    ended = run_torchrun(num_processes, "maxima")
    assert (ended.code, ended.out.count("reduced")) == (0, num_processes), ended.err


def test_torchrun_prints_an_export_error_once() -> None:
    ended = run_torchrun(3, "rank_1_bad_input")
    assert errors(ended.err) == ["dist-export: error: rank 1: model.safetensors: tensor 'x' is cut off"]
    assert ended.code != 0


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_names_a_killed_rank_once_although_it_terminates_the_others(rank: int) -> None:
    ended = run_torchrun(3, f"rank_{rank}_killed", REAL_TIMING="1")
    assert errors(ended.err) == [f"dist-export: error: rank {rank} stopped responding (killed?)"]
    assert ended.code != 0
    assert ended.seconds < 15


def test_srun_exchanges_values_over_the_store_of_rank_0() -> None:
    codes, causes, _seconds = of_ranks(run_srun_like(3, "exchange", job_id=_job()))
    assert (codes, causes) == ([0, 0, 0], [])


def test_srun_reduces_maxima_over_the_store_of_rank_0() -> None:
    codes, causes, _seconds = of_ranks(run_srun_like(2, "maxima", job_id=_job()))
    assert (codes, causes) == ([0, 0], [])


def test_srun_prints_an_export_error_once_and_every_rank_fails() -> None:
    codes, causes, seconds = of_ranks(run_srun_like(3, "rank_1_bad_input", job_id=_job()))
    assert causes == ["dist-export: error: rank 1: model.safetensors: tensor 'x' is cut off"]
    assert codes == [3, 2, 3]
    assert seconds < 10


def test_srun_notices_a_killed_rank_without_help_of_the_launcher() -> None:
    codes, causes, seconds = of_ranks(run_srun_like(3, "rank_1_killed", job_id=_job(), REAL_TIMING="1"))
    assert causes == ["dist-export: error: rank 1 stopped responding (killed?)"]
    assert codes == [3, -9, 3]
    assert seconds < 15


def test_srun_notices_that_rank_0_and_the_store_are_killed() -> None:
    codes, causes, seconds = of_ranks(run_srun_like(3, "rank_0_killed", job_id=_job(), REAL_TIMING="1"))
    assert len(causes) == 1 and causes[0].startswith("dist-export: error: rank 0 stopped responding (killed?)")
    assert codes == [-9, 3, 3]
    assert seconds < 15


def test_srun_stops_cleanly_when_all_ranks_are_terminated() -> None:
    processes = start_srun_like(3, "clean_up", job_id=_job())
    assert processes[0].stdout is not None
    assert "pids" in processes[0].stdout.readline()
    for process in processes:
        process.terminate()
    ended = [finish(process) for process in processes]
    codes, causes, seconds = of_ranks(ended)
    assert codes == [143, 143, 143]
    assert len(causes) == 1 and causes[0].endswith(": stopped by SIGTERM")
    assert sum(each.out.count("cleaned up") for each in ended) == 3
    assert seconds < 8


def _job() -> int:
    """A job id that no other test run on this machine uses now: a free port's number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
