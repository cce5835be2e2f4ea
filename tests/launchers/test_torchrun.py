"""``torchrun launch/export.py`` writes what ``dist-export export`` writes, with any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.exports import REPOSITORY, export  # noqa: E402
from support.small_models import NEMOTRON, small_model  # noqa: E402
from support.torch_dist import megatron_chunks, write_torch_dist  # noqa: E402


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --save folder."""
    folder = tmp_path_factory.mktemp("save")
    model = small_model(NEMOTRON, num_layers=4)
    write_torch_dist(folder / "iter_0000010", model.tensors, args=model.args, chunks=megatron_chunks(tp=2, pp=2))
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


def run_torchrun(num_processes: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [*launcher, str(REPOSITORY / "launch" / "export.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_the_same_bytes_as_without_a_launcher(num_processes: int, save: Path, tmp_path: Path) -> None:
    """From another working folder, and with a relative output."""
    alone = export(save, tmp_path / "alone", "--tp", 2, "--pp", 2, "--vocab-size", 61, "--num-processes", 1)
    options = ("--tp", 2, "--pp", 2, "--vocab-size", 61)
    process = run_torchrun(num_processes, save, "launched", *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    names = [*(f"rank{rank}.safetensors" for rank in range(4)), "config.json"]
    assert sorted(path.name for path in (tmp_path / "launched").iterdir()) == sorted(
        [*names, "export_manifest.json", "export_report.html"]
    )
    for name in names:
        assert (tmp_path / "launched" / name).read_bytes() == (alone / name).read_bytes()
    manifests = [folder / "export_manifest.json" for folder in (alone, tmp_path / "launched")]
    files = [json.loads(manifest.read_text())["files"] for manifest in manifests]
    assert files[0] == files[1]
    assert process.stdout.count("exported nemotron") == 1
    assert "Warning" not in process.stderr, process.stderr


def test_one_process_is_a_run_too(save: Path, tmp_path: Path) -> None:
    process = run_torchrun(1, save, tmp_path / "out", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "config.json").exists()
