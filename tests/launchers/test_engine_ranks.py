"""``dist-export engine`` by ranks of real srun and mpirun. TensorRT-LLM and its ``build()`` are stand-ins.

The ranks find each other, build a share each in processes of their own, and publish one folder. Only the processes that
build import TensorRT-LLM, which is what initialises MPI, and they see nothing of a launcher: MPI is theirs alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import engine_stand_in as stand_in
from support.exports import REPOSITORY, export
from support.mpiruns import Mpirun
from support.own_slurm import Slurm
from support.small_models import LLAMA, small_model
from support.torch_dist import write_torch_dist


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of four target ranks."""
    model = small_model(LLAMA)
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = write_torch_dist(folder / "iter_0000001", model.tensors, args=model.args)
    return export(checkpoint, folder / "out", "--tp", 2, "--pp", 2)


@pytest.fixture
def here(tmp_path: Path) -> dict[str, str]:
    """TensorRT-LLM 0.21 and two Hopper GPUs."""
    environment = stand_in.install(tmp_path, "0.21") | stand_in.gpus(tmp_path, "9.0", "9.0")
    path = f"{environment['PYTHONPATH']}{os.pathsep}{REPOSITORY}"
    return environment | {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1"}


def command(exported: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "dist_export", "engine", str(exported), str(folder / "engines")]


def assert_built(folder: Path, exported: Path) -> None:
    """Four engines, by two ranks, each of the checkpoint of its rank."""
    names = sorted(path.name for path in (folder / "engines").iterdir())
    assert names == ["config.json", *(f"rank{rank}.engine" for rank in range(4))]
    assert "pretrained_config" in json.loads((folder / "engines" / "config.json").read_text())
    calls = stand_in.calls_in(folder)
    builds = {call["arguments"]["rank"]: call for call in calls if call["call"] == "build"}
    loads = {call["pid"]: call["arguments"] for call in calls if call["call"] == "from_checkpoint"}
    assert sorted(builds) == [0, 1, 2, 3]
    for rank, call in builds.items():
        assert loads[call["pid"]] == {"ckpt_dir": str(exported), "config": f"config of rank {rank}"}
        assert call["gpu"] == str(rank % 2)  # that of the rank which builds it
    imports = [call for call in calls if call["call"] == "import"]
    assert sorted(call["pid"] for call in imports) == sorted(call["pid"] for call in builds.values())
    assert all(call["launcher"] == [] for call in imports)


def assert_failed(code: int, text: str, folder: Path) -> None:
    """Non-zero for all; nothing is published, and the cause is told once."""
    assert code != 0
    assert text.count("the engine of target rank 1 on GPU 1: the build failed (exit code 3)") == 1, text
    assert not (folder / "engines").exists()


def srun(slurm: Slurm, here: dict[str, str], *program: str) -> tuple[int, str]:
    process = subprocess.run(
        ["srun", "--nodes=1", "--ntasks=2", *program], env=slurm.environment | here, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    return process.returncode, process.stdout + process.stderr


def test_srun(slurm: Slurm, exported: Path, tmp_path: Path, here: dict[str, str]) -> None:
    code, text = srun(slurm, here, *command(exported, tmp_path))
    assert code == 0, text
    assert_built(tmp_path, exported)


def test_a_rank_of_srun_that_fails_ends_all(slurm: Slurm, exported: Path, tmp_path: Path, here: dict[str, str]) -> None:
    """`--kill-on-bad-exit=0`: the other rank ends by itself."""
    program = command(exported, tmp_path)
    code, text = srun(slurm, here | {"STAND_IN_FAILS": "1"}, "--kill-on-bad-exit=0", *program)
    assert_failed(code, text, tmp_path)


def run_mpi(mpirun: Mpirun, here: dict[str, str], *program: str) -> tuple[int, str]:
    words = map(str, mpirun.command(*program, num_ranks=2))
    process = subprocess.run(list(words), env=os.environ | here, capture_output=True, text=True, timeout=120)
    return process.returncode, process.stdout + process.stderr


def test_mpirun(mpirun: Mpirun, exported: Path, tmp_path: Path, here: dict[str, str]) -> None:
    code, text = run_mpi(mpirun, here, *command(exported, tmp_path))
    assert code == 0, text
    assert_built(tmp_path, exported)


def test_a_rank_of_mpirun_that_fails_ends_all(
    mpirun: Mpirun,
    exported: Path,
    tmp_path: Path,
    here: dict[str, str],
) -> None:
    code, text = run_mpi(mpirun, here | {"STAND_IN_FAILS": "1"}, *command(exported, tmp_path))
    assert_failed(code, text, tmp_path)
