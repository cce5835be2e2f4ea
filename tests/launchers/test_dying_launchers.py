"""Launchers that are killed themselves, and ranks that stall under them: no process stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from support.exports import run_command
from support.faulty_runs import MOST_SECONDS, staged, weights
from support.launched import LAYOUT, finish, processes_with, start, wait_until_gone
from support.mpiruns import find_mpirun
from test_mpi import SCRIPT
from test_torchrun_agents import ADDRESSES, addresses, start_agents

__all__ = ["addresses"]  # a fixture


def start_under(launcher: str, program: str, *arguments: object) -> subprocess.Popen[str]:
    """Four ranks of a program under torchrun or the mpirun of a flavour."""
    if launcher == "torchrun":
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")
        return start(*torchrun, program, *arguments)
    variables = {"MPIRUN": find_mpirun(launcher).path, "NUM_PROCESSES": "4", "PYTHON": sys.executable}
    return start("bash", SCRIPT, *arguments, **variables, EXPORT_PROGRAM=program)


def wait_until_writing(output: Path) -> None:
    """Return when the first bytes are noted in a journal."""
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for folder in staged(output) for path in folder.glob("journal/*.txt")):
        assert time.monotonic() < deadline, "nothing is written"
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", ["openmpi", "mpich"])
def test_killed_launcher(
    launcher: str, long_checkpoint: Path, whole: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    output = tmp_path / "out"
    process = start_under(launcher, program(pace=0.3), long_checkpoint, output, *LAYOUT)
    wait_until_writing(output)
    process.kill()
    begun = time.monotonic()
    seconds = wait_until_gone(str(output), limit_s=60) - begun
    process.communicate()
    print(f"{launcher}, kill of the launcher to the end of all processes: {seconds:.1f} s")
    assert seconds < MOST_SECONDS
    assert not output.exists()
    again = run_command("export", long_checkpoint, output, *LAYOUT, "--resume")
    assert again.returncode == 0, again.stderr
    assert weights(output) == weights(whole)


@pytest.mark.parametrize("number", range(len(ADDRESSES)))
def test_killed_agent(
    number: int, addresses: tuple[str, ...], long_checkpoint: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    """Its ranks go on without it, but for their looking; the other agent's would as well."""
    output = tmp_path / "out"
    agents = start_agents(addresses, program(pace=0.3), long_checkpoint, output, *LAYOUT)
    wait_until_writing(output)
    os.kill(agents[number].pid, signal.SIGKILL)
    begun = time.monotonic()
    seconds = wait_until_gone(str(output), limit_s=60) - begun
    text = "".join(agent.communicate()[0] for agent in agents)
    print(f"kill of agent {number} to the end of all processes: {seconds:.1f} s")
    assert seconds < MOST_SECONDS, text
    gone = ("has lost the launcher's process that started it", "the launching process is gone")
    assert any(cause in text for cause in gone), text
    assert not output.exists()


@pytest.mark.parametrize(("launcher", "rank"), [("torchrun", 2), ("mpich", 0)])
def test_stalled_rank(
    launcher: str, rank: int, long_checkpoint: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    """A stopped process ignores SIGTERM, and Hydra waits for it for ever; the others end it."""
    fault = program(rank=rank, point="transfer", after=5, action="stop", pace=0.05)
    output = tmp_path / "out"
    process = start_under(launcher, fault, long_checkpoint, output, *LAYOUT)
    (ended,) = finish([process], marker=str(output), limit_s=60)
    print(f"{launcher}, stop of rank {rank} to the end of all processes: {ended.seconds:.1f} s")
    assert ended.code != 0 and 0 < ended.seconds < MOST_SECONDS, ended.text
    assert len(ended.causes) == 1 and f"rank {rank} stopped responding" in ended.causes[0], ended.text
    assert not output.exists() and processes_with(str(output)) == []
