"""``dist-export refit`` and ``calibrate`` as two ranks of real srun (on two nodes) and mpirun.

Both run through the same start-up and the same error boundary, so every fault is tried under one launcher only.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from support.exports import REPOSITORY
from support.faulty_runs import MOST_SECONDS
from support.launched import Ended, run
from support.mpiruns import find_mpirun
from support.refits import NEW, assert_same_export, contents, exports_of_both

CHECKPOINT = REPOSITORY / "tests" / "conformance" / "checkpoints" / "llama_core_0_16_tp2pp2"
PROGRAM = ("-m", "dist_export")
Launch = Callable[..., Ended]


@pytest.fixture
def launch(request: pytest.FixtureRequest, tmp_path: Path) -> Launch:
    """`launch("srun", *program)` runs two ranks of a Python program to the end of all processes."""

    def start(launcher: str, *program: object) -> Ended:
        environment = {"PYTHONPATH": str(REPOSITORY)}
        if launcher == "srun":  # the names of its nodes do not resolve, so the address is given
            slurm = request.getfixturevalue("slurm")
            environment = slurm.environment | environment | {"MASTER_ADDR": "127.0.0.1"}
            command: list[object] = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
        else:
            command = find_mpirun(launcher).command(num_ranks=2)
        return run(*command, sys.executable, *program, marker=str(tmp_path), **environment)

    return start


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A --save folder and an export of each of its iterations, which differ everywhere."""
    return exports_of_both(tmp_path_factory.mktemp("refits"), padded_vocab_size=4096)


@pytest.fixture
def output(exports: dict[str, Path], tmp_path: Path) -> Path:
    """An export of the older iteration."""
    return Path(shutil.copytree(exports["old"], tmp_path / "out"))


@pytest.mark.parametrize("launcher", ["srun", "openmpi", "mpich"])
def test_refit(launcher: str, launch: Launch, exports: dict[str, Path], output: Path) -> None:
    ended = launch(launcher, *PROGRAM, "refit", exports["save"], output, "--iteration", NEW)
    assert ended.code == 0, ended.text
    assert ended.text.count("iteration 10 to 20") == 1
    assert_same_export(output, exports["new"])


@pytest.mark.parametrize(
    ("launcher", "source", "options", "message"),
    [
        ("srun", "nothing", (), "nothing: no such file or folder"),
        ("mpich", "save", ("--all-names",), "--all-names: is for --delta-dir DIR"),
    ],
)
def test_refit_refuses_once(
    launcher: str,
    source: str,
    options: tuple[object, ...],
    message: str,
    launch: Launch,
    exports: dict[str, Path],
    output: Path,
) -> None:
    given = exports.get(source, output.parent / source)
    ended = launch(launcher, *PROGRAM, "refit", given, output, *options)
    assert ended.code in (2, 3), ended.text
    assert len(ended.causes) == 1 and ended.causes[0].endswith(message), ended.text
    if launcher == "srun":  # which says how each rank ended
        assert sorted(re.findall(r"exit code (\d)", ended.text)) == ["2", "3"]
    assert contents(output) == contents(exports["old"])


def test_a_killed_rank_ends_a_refit(launch: Launch, exports: dict[str, Path], output: Path) -> None:
    """The export stays as it was."""
    program = (Path(__file__).with_name("killed_rank.py"), 0)
    ended = launch("openmpi", *program, "refit", exports["save"], output, "--iteration", NEW)
    assert ended.code != 0 and 0 < ended.seconds < MOST_SECONDS, ended.text
    assert len(ended.causes) <= 1 and "signal 9" in ended.text, ended.text
    assert contents(output) == contents(exports["old"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ids.txt"
    path.write_text("1 2 3 4 5 6 7\n8 9 10 11 12\n")
    return path


@pytest.fixture(scope="module")
def calibrated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one process finds."""
    from dist_export.cli import main

    pytest.importorskip("modelopt", reason="calibration is ModelOpt's")
    pytest.importorskip("megatron.core")
    path = tmp_path_factory.mktemp("calibrated") / "one"
    assert main(["calibrate", str(CHECKPOINT), str(path), "--data", str(data)]) == 0
    return path.read_bytes()


def test_calibrate(launch: Launch, calibrated: bytes, data: Path, tmp_path: Path) -> None:
    """Two pipeline stages compute what one process does."""
    path = tmp_path / "two"
    ended = launch("srun", *PROGRAM, "calibrate", CHECKPOINT, path, "--data", data, "--pp", 2)
    assert ended.code == 0, ended.text
    assert ended.text.count("held by 2 processes: tp 1 x pp 2") == 1
    assert path.read_bytes() == calibrated


@pytest.mark.usefixtures("calibrated")
def test_a_killed_rank_ends_a_calibration(launch: Launch, data: Path, tmp_path: Path) -> None:
    program = (Path(__file__).with_name("killed_rank.py"), 0)
    ended = launch("mpich", *program, "calibrate", CHECKPOINT, tmp_path / "two", "--data", data, "--pp", 2)
    assert ended.code != 0 and 0 < ended.seconds < MOST_SECONDS, ended.text
    assert list(tmp_path.iterdir()) == []
