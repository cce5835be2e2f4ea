"""--log-json and --progress-file of real exports, whole and failed, with own processes and with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.exports import run_command  # noqa: E402
from support.faulty_runs import run  # noqa: E402
from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import write_torch_dist  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model(LLAMA)
    return write_torch_dist(tmp_path_factory.mktemp("save") / "iter_0000010", model.tensors, args=model.args)


def events(text: str) -> list[dict[str, object]]:
    """Every line of standard error is one."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_whole_export(num_processes: int, checkpoint: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    options = ("--tp", 2, "--num-processes", num_processes, "--log-json", "--progress-file", progress)
    process = run_command("export", checkpoint, tmp_path / "out", *options)
    assert process.returncode == 0, process.stderr
    told = events(process.stderr)
    assert [each["event"] for each in told if each["event"] != "phase"] == ["start", "done"]
    phases = [each["phase"] for each in told if each["event"] == "phase"]
    assert phases == ["plan", "transfer", "sync", "publish"]
    assert told[0]["num_ranks"] == num_processes and told[0]["output"] == str(tmp_path / "out")
    last = json.loads(progress.read_text())
    assert (last["state"], last["exit_code"], last["phase"]) == ("done", 0, "publish")
    assert last["bytes_written"] == last["bytes_total"] == told[-1]["bytes_written"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "progress.json"]


def test_bad_input(checkpoint: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    process = run_command("export", checkpoint, tmp_path / "out", "--tp", 7, "--log-json", "--progress-file", progress)
    assert process.returncode == 2
    (failure,) = events(process.stderr)
    assert (failure["event"], failure["kind"], failure["exit_code"]) == ("failure", "input", 2)
    last = json.loads(progress.read_text())
    assert (last["state"], last["exit_code"], last["message"]) == ("failed", 2, failure["message"])


def test_a_killed_rank(checkpoint: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    options = ("--tp", 2, "--log-json", "--progress-file", progress)
    ended = run(checkpoint, tmp_path / "out", *options, rank=1, point="transfer", action="kill")
    assert ended.code == 3
    (failure,) = [each for each in events(ended.err) if each["event"] == "failure"]
    assert (failure["rank"], failure["kind"]) == (1, "lost")
    assert "was killed by signal 9" in str(failure["message"])
    assert json.loads(progress.read_text())["state"] == "failed"


def test_a_progress_file_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    progress = tmp_path / "none" / "progress.json"
    process = run_command("export", checkpoint, tmp_path / "out", "--progress-file", progress)
    assert process.returncode == 2
    assert "progress.json: cannot write: No such file or directory" in process.stderr
    assert not (tmp_path / "out").exists()
