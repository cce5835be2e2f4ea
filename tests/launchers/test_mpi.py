"""launch/export_mpi.sh under real Open MPI and MPICH: the same bytes, and nothing left when a rank is killed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from support.exports import REPOSITORY, run_command
from support.faulty_runs import MOST_SECONDS, weights
from support.launched import LAYOUT, Ended, run
from support.mpiruns import Mpirun

SCRIPT = REPOSITORY / "launch" / "export_mpi.sh"


def run_script(mpirun: Mpirun, *arguments: object, output: Path, **extra: str) -> Ended:
    """`bash launch/export_mpi.sh` with four processes."""
    variables = {"MPIRUN": mpirun.path, "NUM_PROCESSES": "4", "PYTHON": sys.executable, **extra}
    return run("bash", SCRIPT, *arguments, marker=str(output), **variables)


def test_the_script_starts_mpirun(mpirun: Mpirun, long_checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    ended = run_script(mpirun, long_checkpoint, tmp_path / "out", *LAYOUT, output=tmp_path / "out")
    assert ended.code == 0, ended.text
    assert ended.text.count("exported llama") == 1
    assert weights(tmp_path / "out") == weights(whole)


def test_a_hostfile_says_how_many(mpirun: Mpirun, long_checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    hostfile, output = tmp_path / "hosts", tmp_path / "out"
    line = "localhost slots=3" if mpirun.flavour == "openmpi" else "localhost:3"
    hostfile.write_text(f"# all here\n{line}\n")
    arguments = (long_checkpoint, output, *LAYOUT, "--log-json")
    ended = run_script(mpirun, *arguments, output=output, HOSTFILE=str(hostfile), NUM_PROCESSES="")
    assert ended.code == 0, ended.text
    assert '"num_ranks": 3' in ended.text
    assert weights(output) == weights(whole)


def test_mpirun_starts_the_script(mpirun: Mpirun, long_checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    """Without anybody who sets an address: the ranks agree on one."""
    output = tmp_path / "out"
    command = mpirun.command(SCRIPT, long_checkpoint, output, *LAYOUT)
    ended = run(*command, marker=str(output), PYTHON=sys.executable)
    assert ended.code == 0, ended.text
    assert weights(output) == weights(whole)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_ends_all(
    rank: int, mpirun: Mpirun, long_checkpoint: Path, whole: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    fault = program(rank=rank, point="transfer", after=5, action="kill", pace=0.05)
    output = tmp_path / "out"
    ended = run_script(mpirun, long_checkpoint, output, *LAYOUT, output=output, EXPORT_PROGRAM=fault)
    print(f"{mpirun.flavour}, kill of rank {rank} to the end of all processes: {ended.seconds:.1f} s")
    assert ended.code != 0 and 0 < ended.seconds < MOST_SECONDS, ended.text
    if mpirun.flavour == "openmpi":
        assert len(ended.causes) == 1 and f"rank {rank} stopped responding" in ended.causes[0], ended.text
    else:  # Hydra kills the others at once and says itself what was killed
        assert len(ended.causes) <= 1 and ended.text.count("EXIT STRING: Killed (signal 9)") == 1, ended.text
    assert not output.exists()
    again = run_command("export", long_checkpoint, output, *LAYOUT, "--resume")
    assert again.returncode == 0, again.stderr
    assert weights(output) == weights(whole)


def test_a_rank_that_refuses_its_input_says_so_once(
    mpirun: Mpirun, long_checkpoint: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    fault = program(rank=1, point="before files", action="refuse")
    output = tmp_path / "out"
    ended = run_script(mpirun, long_checkpoint, output, *LAYOUT, output=output, EXPORT_PROGRAM=fault)
    assert ended.code in (2, 3)
    assert ended.causes == ["dist-export: error: rank 1: something is wrong with the input"], ended.text
    assert list(tmp_path.glob(".out*")) == []


def test_mpirun_alone_ends_all_when_a_rank_is_killed(
    mpirun: Mpirun, long_checkpoint: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    """mpirun kills the others before they can say anything, and names the cause itself."""
    fault = program(rank=1, point="transfer", after=5, action="kill", pace=0.05)
    output = tmp_path / "out"
    command = mpirun.command(SCRIPT, long_checkpoint, output, *LAYOUT)
    ended = run(*command, marker=str(output), PYTHON=sys.executable, EXPORT_PROGRAM=fault)
    print(f"{mpirun.flavour} alone, kill to the end of all processes: {ended.seconds:.1f} s")
    assert ended.code != 0 and 0 < ended.seconds < MOST_SECONDS, ended.text
    assert len(ended.causes) <= 1 and "signal 9" in ended.text, ended.text
