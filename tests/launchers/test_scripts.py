"""Help, dry runs and refusals of the launch scripts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("isal")

LAUNCH = Path(__file__).parents[2] / "launch"
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node1"}


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`bash launch/SCRIPT` with this interpreter, wherever it is called from."""
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], cwd="/", capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHON": sys.executable, **variables},
    )  # fmt: skip


@pytest.mark.parametrize("script", ["export.sbatch", "export_mpi.sh"])
def test_help(script: str) -> None:
    process = run(script, "--help")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("Export a Megatron checkpoint")
    assert "EXPORT_PROGRAM" in process.stdout and "--progress-file" in process.stdout
    assert "set -euo" not in process.stdout and "SBATCH" not in process.stdout


def test_the_same_options_everywhere() -> None:
    texts = [run(script, "--help").stdout for script in ("export.sbatch", "export_mpi.sh")]
    command = [sys.executable, str(LAUNCH / "export.py"), "--help"]
    texts.append(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
    assert len({text[text.index("usage: export.py") :] for text in texts}) == 1


def test_export_sbatch_outside_slurm_says_how() -> None:
    process = run("export.sbatch", "checkpoint", "output", SLURM_JOB_ID="")
    assert process.returncode == 2
    assert "this is a Slurm job: sbatch" in process.stderr


def dry_run(tmp_path: Path, **variables: str) -> list[str]:
    """The srun command that export.sbatch would run."""
    extra = {"DRY_RUN": "1", "LOG_DIR": str(tmp_path), "DIST_EXPORT": str(LAUNCH.parent), **JOB, **variables}
    process = run("export.sbatch", "checkpoint", "output", "--tp", "4", **extra)
    assert process.returncode == 0, process.stderr
    return shlex.split(process.stdout)


def test_a_container_by_variables(tmp_path: Path) -> None:
    command = dry_run(tmp_path, CONTAINER_IMAGE="/images/dist export.sqsh", CONTAINER_MOUNTS="/data:/data,/x:/x")
    assert "--container-image=/images/dist export.sqsh" in command
    assert "--container-mounts=/data:/data,/x:/x" in command
    assert command[-7:] == ["python3", "-m", "dist_export.launcher", "checkpoint", "output", "--tp", "4"]


def test_a_restarted_job_resumes(tmp_path: Path) -> None:
    assert "--resume" not in dry_run(tmp_path)
    assert dry_run(tmp_path, SLURM_RESTART_COUNT="2")[-1] == "--resume"


def test_export_mpi_without_mpirun_says_so() -> None:
    process = run("export_mpi.sh", "checkpoint", "output", MPIRUN="no-such-mpirun")
    assert process.returncode == 2
    assert "no-such-mpirun is not there" in process.stderr


def test_export_mpi_refuses_an_empty_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# nobody\n\n")
    process = run("export_mpi.sh", "checkpoint", "output", HOSTFILE=str(tmp_path / "hosts"))
    assert process.returncode == 2
    assert "names no host" in process.stderr


def test_export_mpi_takes_rank_0_from_the_hostfile(tmp_path: Path) -> None:
    """A program that prints what it is called with stands for mpirun over machines that are not there."""
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=4 # smaller\n")
    printer = tmp_path / "mpirun"
    printer.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "mpirun (Open MPI) 5.0" || echo "$MASTER_ADDR" "$@"\n')
    printer.chmod(0o755)
    process = run("export_mpi.sh", "in", "out", MPIRUN=str(printer), HOSTFILE=str(tmp_path / "hosts"), FORWARD="HOME")
    words = process.stdout.split()
    assert words[:5] == ["node1", "-np", "12", "--hostfile", str(tmp_path / "hosts")], process.stderr
    assert words[-3:] == [str(LAUNCH / "export_mpi.sh"), "in", "out"]
    assert {"MASTER_ADDR", "MASTER_PORT", "HOME", "PATH"} <= set(words)


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.s[bh]*")))
def test_bash_takes_every_script(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)], timeout=60).returncode == 0
