"""Starting `rank_program.py` under our own launcher, under torchrun and as bare ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).with_name("rank_program.py")
ROOT = PROGRAM.parents[2]

#: Variables of whatever launcher the tests themselves run under; and output shall be buffered as it is by default.
_REMOVED = (
    "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC", "SLURM_", "OMPI_", "PMI",
    "PYTHONUNBUFFERED",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """What a program did, and when, by the system's monotonic clock.

    `since` is when a rank said that it was about to be killed, else the beginning of the wait for the end; `until` is
    the end of all processes that held its output.
    """

    code: int
    out: str
    err: str
    since: float
    until: float

    @property
    def seconds(self) -> float:
        """How long the end took."""
        return self.until - self.since


def environment(**extra: str) -> dict[str, str]:
    """The environment of a fresh shell: without the variables of any launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_REMOVED)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def start(*command: str, **extra: str) -> subprocess.Popen[str]:
    """Start a program in its own process group, output captured."""
    return subprocess.Popen(
        command, env=environment(**extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], *, limit_s: float = 60.0) -> Ended:
    """Wait for the end of a started program and of all who share its output."""
    begun = time.monotonic()
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"still running after {limit_s} s\n{out}\n{err}") from None
    dying = [float(line.split()[-1]) for line in out.splitlines() if " dies at " in line]
    return Ended(process.returncode, out, err, dying[0] if dying else begun, time.monotonic())


def local_command(num_processes: int, scenario: str) -> list[str]:
    """Our own launcher."""
    return [sys.executable, str(PROGRAM), "local", str(num_processes), scenario]


def run_forked(num_processes: int, scenario: str, **extra: str) -> Ended:
    """`scenario` in forked ranks."""
    return finish(start(*local_command(num_processes, scenario), **extra))


def run_torchrun(num_processes: int, scenario: str, **extra: str) -> Ended:
    """`scenario` under torchrun on this machine."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}")
    return finish(start(*torchrun, str(PROGRAM), "here", scenario, **extra))


def run_srun_like(num_ranks: int, scenario: str, *, job_id: int, **extra: str) -> list[Ended]:
    """`scenario` in ranks that have what srun gives them, started without a launcher that watches them."""
    return [finish(process) for process in start_srun_like(num_ranks, scenario, job_id=job_id, **extra)]


def start_srun_like(num_ranks: int, scenario: str, *, job_id: int, **extra: str) -> list[subprocess.Popen[str]]:
    """The processes of `run_srun_like`, by rank."""
    return [
        start(
            sys.executable, str(PROGRAM), "here", scenario,
            SLURM_JOB_ID=str(job_id), SLURM_STEP_ID="0", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank),
            SLURM_NTASKS=str(num_ranks), SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE=str(num_ranks), **extra,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
