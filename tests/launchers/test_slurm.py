"""launch/export.sbatch in a real Slurm of two nodes: the same bytes, requeued and resumed, cancelled, killed ranks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from support.exports import REPOSITORY
from support.faulty_runs import MOST_SECONDS, bytes_read, staged, weights
from support.launched import LAYOUT, died_at, processes_with, wait_until_gone
from support.own_slurm import Slurm

SCRIPT = REPOSITORY / "launch" / "export.sbatch"
FOUR = ("--nodes", 1, "--ntasks-per-node", 4, "--cpus-per-task", 1)
PACE = 0.1
"""Seconds per write, so that there is time within the transfer: about 50 writes per rank."""


def submit(slurm: Slurm, folder: Path, *arguments: object, sbatch: tuple[object, ...] = FOUR, **extra: str) -> int:
    """sbatch with this interpreter; the job's log is job.log, the ranks' logs are in logs."""
    extra = {"PYTHON": sys.executable, "LOG_DIR": str(folder / "logs"), **extra}
    options = ("--output", folder / "job.log", *sbatch)
    return slurm.submit(*options, SCRIPT, *map(str, arguments), cwd=folder, **extra)


def wait_until_writing(folder: Path) -> None:
    """Return when rank 0 has written a little."""
    log, deadline = folder / "logs" / "rank-0.log", time.monotonic() + 60
    while not (log.exists() and "writing" in log.read_text()):
        assert time.monotonic() < deadline, (folder / "job.log").read_text()
        time.sleep(0.02)


def logs(folder: Path) -> str:
    """Everything the job and its ranks wrote."""
    return "".join(path.read_text() for path in [folder / "job.log", *sorted((folder / "logs").glob("rank-*.log"))])


def test_a_job_writes_what_one_machine_writes(slurm: Slurm, long_checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    job = slurm.wait(submit(slurm, tmp_path, long_checkpoint, tmp_path / "out", *LAYOUT, "--progress-file", progress))
    assert job["JobState"] == "COMPLETED", logs(tmp_path)
    assert weights(tmp_path / "out") == weights(whole)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"rank-{rank}.log" for rank in range(4)]
    assert (tmp_path / "logs" / "rank-0.log").read_text().count("exported llama") == 1
    assert json.loads(progress.read_text())["state"] == "done"


@pytest.mark.parametrize("distribution", ["block", "cyclic"])
def test_two_nodes(distribution: str, slurm: Slurm, long_checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    """The names of these nodes do not resolve, so the address is given."""
    two = ("--nodes", 2, "--ntasks-per-node", 2, "--cpus-per-task", 1)
    extra = {"MASTER_ADDR": "127.0.0.1", "SRUN_ARGS": f"--distribution={distribution}"}
    arguments = (long_checkpoint, tmp_path / "out", *LAYOUT)
    job = slurm.wait(submit(slurm, tmp_path, *arguments, sbatch=two, **extra))
    assert job["JobState"] == "COMPLETED", logs(tmp_path)
    assert weights(tmp_path / "out") == weights(whole)


@pytest.mark.parametrize("how", ["scontrol requeue", "signal before the time limit"])
def test_a_requeued_job_resumes_by_itself(
    how: str, slurm: Slurm, long_checkpoint: Path, whole: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    arguments = (long_checkpoint, tmp_path / "out", *LAYOUT)
    number = submit(slurm, tmp_path, *arguments, EXPORT_PROGRAM=program(pace=PACE))
    wait_until_writing(tmp_path)
    time.sleep(1.0)
    if how == "scontrol requeue":
        slurm.command("scontrol", "requeue", number)
    else:
        slurm.command("scancel", "--batch", "--signal=USR1", number)
    job = slurm.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
    assert weights(tmp_path / "out") == weights(whole)
    assert bytes_read(tmp_path / "out") < 0.9 * bytes_read(whole)
    assert staged(tmp_path / "out") == []


def test_a_cancelled_job_leaves_what_another_one_resumes(
    slurm: Slurm, long_checkpoint: Path, whole: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    arguments = (long_checkpoint, tmp_path / "out", *LAYOUT)
    number = submit(slurm, tmp_path, *arguments, EXPORT_PROGRAM=program(pace=PACE))
    wait_until_writing(tmp_path)
    time.sleep(1.0)
    begun = time.monotonic()
    slurm.command("scancel", number)
    assert slurm.wait(number)["JobState"] == "CANCELLED"
    seconds = wait_until_gone(str(tmp_path / "out"), limit_s=20) - begun
    print(f"scancel to the end of all processes: {seconds:.1f} s")
    assert seconds < MOST_SECONDS
    assert not (tmp_path / "out").exists()
    (tmp_path / "logs" / "rank-0.log").unlink()
    job = slurm.wait(submit(slurm, tmp_path, *arguments, "--resume"))
    assert job["JobState"] == "COMPLETED", logs(tmp_path)
    assert weights(tmp_path / "out") == weights(whole)
    assert bytes_read(tmp_path / "out") < 0.9 * bytes_read(whole)


def test_a_job_requeued_after_it_had_published_is_done(
    slurm: Slurm, long_checkpoint: Path, whole: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    """Its ranks 1 to 3 still stand where the export has been published already."""
    fault = program(rank=1, point="end", action="60")
    number = submit(slurm, tmp_path, long_checkpoint, tmp_path / "out", *LAYOUT, EXPORT_PROGRAM=fault)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "config.json").exists():
        assert time.monotonic() < deadline, logs(tmp_path)
        time.sleep(0.05)
    slurm.command("scontrol", "requeue", number)
    job = slurm.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
    assert logs(tmp_path).count("holds this export already: nothing to do") == 1
    assert weights(tmp_path / "out") == weights(whole)


def test_a_killed_srun_leaves_nothing(
    slurm: Slurm, long_checkpoint: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    arguments = (long_checkpoint, tmp_path / "out", *LAYOUT)
    number = submit(slurm, tmp_path, *arguments, EXPORT_PROGRAM=program(pace=0.3))
    wait_until_writing(tmp_path)
    sruns = [pid for pid in processes_with(str(tmp_path / "out")) if is_srun(pid)]
    assert sruns
    begun = time.monotonic()
    for pid in sruns:
        os.kill(pid, signal.SIGKILL)
    seconds = wait_until_gone(str(tmp_path / "out"), limit_s=60) - begun
    print(f"kill of srun to the end of all processes: {seconds:.1f} s")
    assert seconds < MOST_SECONDS
    assert slurm.wait(number)["JobState"] == "FAILED"
    assert not (tmp_path / "out").exists()


def is_srun(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "srun"


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank_ends_the_job(
    rank: int, slurm: Slurm, long_checkpoint: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    fault = program(rank=rank, point="transfer", after=5, action="kill", pace=PACE)
    two = ("--nodes", 2, "--ntasks-per-node", 2, "--cpus-per-task", 1)
    arguments = (long_checkpoint, tmp_path / "out", *LAYOUT)
    extra = {"EXPORT_PROGRAM": fault, "MASTER_ADDR": "127.0.0.1"}
    job = slurm.wait(submit(slurm, tmp_path, *arguments, sbatch=two, **extra))
    until = wait_until_gone(str(tmp_path / "out"), limit_s=20)
    text = logs(tmp_path)
    dying = died_at(text)
    assert dying is not None, text
    print(f"kill of rank {rank} to the end of all processes: {until - dying:.1f} s")
    assert until - dying < MOST_SECONDS
    assert job["JobState"] == "FAILED" and job["ExitCode"] != "0:0"
    causes = [line for line in (tmp_path / "job.log").read_text().splitlines() if line.startswith("dist-export: ")]
    assert len(causes) == 1 and causes[0].startswith(f"dist-export: error: rank {rank} stopped responding"), text


def test_bad_input_fails_the_job_with_its_code(slurm: Slurm, long_checkpoint: Path, tmp_path: Path) -> None:
    arguments = (long_checkpoint, tmp_path / "out", "--tp", 7, "--log-json")
    job = slurm.wait(submit(slurm, tmp_path, *arguments))
    assert (job["JobState"], job["ExitCode"].split(":")[0]) in (("FAILED", "2"), ("FAILED", "3")), logs(tmp_path)
    (line,) = [line for line in (tmp_path / "job.log").read_text().splitlines() if line.startswith("{")]
    failure = json.loads(line)
    assert (failure["event"], failure["kind"], failure["exit_code"]) == ("failure", "input", 2)
