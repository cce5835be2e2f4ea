"""What an undisturbed export makes of the long checkpoint, a Slurm for all tests, and faulty programs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.faulty_runs import PROGRAM
from support.launched import LAYOUT
from support.mpiruns import MPIRUNS, Mpirun, find_mpirun
from support.own_slurm import Slurm, running_slurm, why_not


@pytest.fixture(scope="session")
def whole(long_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dist-export export` makes of it, without a launcher."""
    from support.exports import export

    return export(long_checkpoint, tmp_path_factory.mktemp("whole") / "out", *LAYOUT, "--num-processes", 1)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes; skipped where Slurm cannot run."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with running_slurm(2) as cluster:
        yield cluster


@pytest.fixture(params=sorted(MPIRUNS))
def mpirun(request: pytest.FixtureRequest) -> Mpirun:
    """Open MPI's, then MPICH's."""
    return find_mpirun(request.param)


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., str]:
    """`program(pace=0.1)` is launch/export.py with this fault (see tests/faults/faulty_export.py), as a program of
    its own. In a requeued job it has none."""

    def write(**fault: object) -> str:
        path = tmp_path / "faulty.py"
        path.write_text(
            "import os, runpy, sys\n"
            f"fault = {json.dumps(fault)!r} if os.environ.get('SLURM_RESTART_COUNT', '0') == '0' else '{{}}'\n"
            f"sys.argv = [{str(PROGRAM)!r}, 'launched', fault, *sys.argv[1:]]\n"
            f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
        )
        return str(path)

    return write


@pytest.fixture(autouse=True)
def fresh_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers see no variables of whatever launcher the tests themselves run under."""
    prefixes = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC", "SLURM_", "OMPI_", "PMI")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
