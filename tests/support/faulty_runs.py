"""Running tests/faults/faulty_export.py, and what must hold after any fault: see `check_failure`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "faults" / "faulty_export.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC", "SLURM_", "OMPI_", "PMI")

MOST_SECONDS = 15.0
"""From a fault to the end of all processes."""

TELLS_OF_THE_RUN = ("export_manifest.json", "export_report.html")
"""Files of an export that say how it went."""

Contents = dict[str, bytes | None]


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    out: str
    err: str
    seconds: float
    """From the fault (or, without one that says so, from the start) to the end of all processes."""

    @property
    def causes(self) -> list[str]:
        """The causes printed."""
        return [line for line in self.err.splitlines() if line.startswith("dist-export: ")]


def start(
    checkpoint: Path, output: Path, *options: object, num_processes: int = 2, torchrun: bool = False, **fault: object
) -> subprocess.Popen[str]:
    """Start an export with a fault, in a process group of its own."""
    fault = {name.replace("_", " ") if name == "no_exchange" else name: value for name, value in fault.items()}
    arguments = [json.dumps(fault), str(checkpoint), str(output), *map(str, options)]
    if torchrun:
        command = [*TORCHRUN, f"--nproc-per-node={num_processes}", str(PROGRAM), "launched", *arguments]
    else:
        command = [sys.executable, str(PROGRAM), "local", *arguments, "--num-processes", str(num_processes)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    return subprocess.Popen(
        command, env=kept | {"OMP_NUM_THREADS": "1", "PET_LOCAL_ADDR": "127.0.0.1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], *, since: float | None = None, limit_s: float = 60.0) -> Ended:
    """Wait for the end of a run and of all processes that share its output."""
    begun = time.monotonic() if since is None else since
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"still running after {limit_s} s\n{out}\n{err}") from None
    until = time.monotonic()
    dying = [float(line.split()[-1]) for line in out.splitlines() if " dies at " in line]
    return Ended(process.returncode, out, err, until - (dying[0] if dying else begun))


def run(checkpoint: Path, output: Path, *options: object, **more: object) -> Ended:
    """`start` and `finish`."""
    return finish(start(checkpoint, output, *options, **more))  # type: ignore[arg-type]


@contextmanager
def writing(checkpoint: Path, output: Path, *options: object, **more: object) -> Iterator[subprocess.Popen[str]]:
    """An export in the middle of its slow transfer; killed at the end of the block if it still runs."""
    process = start(checkpoint, output, *options, **more)  # type: ignore[arg-type]
    try:
        wait_until_writing(process)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.communicate()


def wait_until_writing(process: subprocess.Popen[str]) -> None:
    """Return when rank 0 has written a little."""
    assert process.stdout is not None
    line = process.stdout.readline()
    while "writing" not in line:
        assert line, f"ended early: {process.communicate()[1]}"
        line = process.stdout.readline()


def contents(folder: Path) -> Contents:
    """Every path below a folder with its bytes (None for a folder), hidden ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def weights(folder: Path) -> dict[str, bytes]:
    """The tensor files and configurations of an export: what must not depend on how the export went."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TELLS_OF_THE_RUN
    }


def staged(output: Path) -> list[Path]:
    """Hidden folders that exports to `output` left."""
    names = [p for p in output.parent.iterdir() if p.name.startswith(f".{output.name}.dist_export")]
    return names + ([p for p in output.iterdir() if p.name.startswith(".dist_export")] if output.is_dir() else [])


def bytes_read(folder: Path) -> int:
    """Source bytes read by all processes of the run that published an export."""
    return _sum(folder, "bytes_read")


def bytes_needed(folder: Path) -> int:
    """Source bytes that the work of the run that published an export needs, were none of it done before."""
    return _sum(folder, "bytes_needed")


def _sum(folder: Path, statistic: str) -> int:
    manifest = min(folder.rglob("export_manifest.json"))  # with several targets each has it
    return sum(each[statistic] for each in json.loads(manifest.read_text())["run"]["processes"])


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
