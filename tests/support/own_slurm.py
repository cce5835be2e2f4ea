"""A Slurm of the tests' own: munged, slurmctld and slurmds in the foreground, in one folder, on free ports."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
_UNFINISHED = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC", "SLURM_", "OMPI_", "PMI")

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials have expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
JobRequeue=1
KillWait=20
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why Slurm cannot be started here, or None."""
    missing = [name for name in _PROGRAMS if _find(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd and munged of the tests' own need root"
    return None


@dataclass(frozen=True)
class Slurm:
    """A running Slurm, and the commands to use it with."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a fresh shell on a machine of this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *arguments: object, cwd: Path | None = None, **extra: str) -> str:
        """Run one of Slurm's commands; returns what it prints. AssertionError when it fails."""
        process = subprocess.run(
            [str(each) for each in arguments], cwd=cwd, env=self.environment | extra, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    def submit(self, *arguments: object, cwd: Path, **extra: str) -> int:
        """sbatch; returns the job's number."""
        return int(self.command("sbatch", "--parsable", *arguments, cwd=cwd, **extra))

    def job(self, number: int) -> dict[str, str]:
        """What scontrol tells of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", number)))

    def wait(self, number: int, *, limit_s: float = 90.0) -> dict[str, str]:
        """Wait for a job's end; AssertionError with its logs' tail when it does not come."""
        deadline = time.monotonic() + limit_s
        while (job := self.job(number))["JobState"] in _UNFINISHED:
            logs = "".join(path.read_text()[-2000:] for path in self.folder.glob("slurmd*.log"))
            assert time.monotonic() < deadline, (job, logs)
            time.sleep(0.1)
        return job


@contextmanager
def running_slurm(num_nodes: int = 1) -> Iterator[Slurm]:
    """A Slurm whose nodes are all this machine, with 8 CPUs each, real or not; stopped at the end of the block."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + num_nodes)
        nodes = "\n".join(
            f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 State=UNKNOWN"
            for number, port in enumerate(ports[1:], 1)
        )
        text = _CONFIGURATION.format(folder=folder, host=host, controller_port=ports[0], nodes=nodes)
        (folder / "slurm.conf").write_text(text)
        slurm = Slurm(folder)
        _start_munged(stack, folder)
        _start(stack, [_find("slurmctld") or "slurmctld", "-D"], slurm.environment)
        for number in range(1, num_nodes + 1):
            _start(stack, [_find("slurmd") or "slurmd", "-D", "-N", f"node{number}"], slurm.environment)
        stack.callback(_cancel_all, slurm)
        _wait_until_idle(slurm)
        yield slurm


def _start_munged(stack: contextlib.ExitStack, folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
    _start(stack, [_find("munged") or "munged", "--foreground", "--force", *options], dict(os.environ))
    deadline = time.monotonic() + 10
    while not (folder / "munge.socket").exists():
        assert time.monotonic() < deadline, (folder / "munge.log").read_text()
        time.sleep(0.02)


def _start(stack: contextlib.ExitStack, command: list[str], environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def stop() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)


def _wait_until_idle(slurm: Slurm) -> None:
    deadline = time.monotonic() + 30
    while True:
        process = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=slurm.environment, capture_output=True, text=True, timeout=60
        )
        if set(process.stdout.split()) == {"idle"}:
            return
        logs = "".join(path.read_text()[-2000:] for path in slurm.folder.glob("*.log"))
        assert time.monotonic() < deadline, process.stdout + process.stderr + logs
        time.sleep(0.1)


def _cancel_all(slurm: Slurm) -> None:
    """No job and no slurmstepd outlives the cluster."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        slurm.command("scancel", "--user=root", "--full")
        deadline = time.monotonic() + 30
        while slurm.command("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
