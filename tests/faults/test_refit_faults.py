"""Refits on disks that are full, on mount points, and stopped by a signal."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.exports import REPOSITORY  # noqa: E402
from support.refits import NEW, OLD, assert_same_export, contents, exports_of_both, names, run  # noqa: E402

from dist_export.errors import ExportError  # noqa: E402
from dist_export.refit.base import Base  # noqa: E402


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A --save folder and an export of each of its iterations, which differ everywhere."""
    return exports_of_both(tmp_path_factory.mktemp("refit_faults"), padded_vocab_size=4096)


def test_a_full_disk_leaves_the_export_as_it_was(
    exports: dict[str, Path], mounted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(len(data) for data in contents(exports["old"]).values())
    disk = mounted(f"size={(size * 3 // 2) >> 10}k")
    output = Path(shutil.copytree(exports["old"], disk / "out"))
    assert run("refit", exports["save"], output, "--iteration", NEW) == 2
    assert "cannot write: the disk is full" in capsys.readouterr().err
    assert contents(output) == contents(exports["old"])
    assert [path.name for path in disk.iterdir()] == ["out"]


def test_a_mount_point(exports: dict[str, Path], mounted: Callable[..., Path]) -> None:
    """Where nothing can be put beside the output."""
    output = mounted("size=20m")
    shutil.copytree(exports["old"], output, dirs_exist_ok=True)
    delta = output.parent / "delta"
    assert run("refit", exports["save"], output, "--iteration", NEW, "--delta-dir", delta) == 0
    assert run("refit", exports["save"], output, "--iteration", NEW) == 0
    assert_same_export(output, exports["new"])
    assert run("refit", exports["save"], output, "--iteration", OLD) == 0
    assert run("refit", delta, output) == 0
    assert_same_export(output, exports["new"])


def test_a_folder_that_takes_no_documents(exports: dict[str, Path], mounted: Callable[..., Path]) -> None:
    """Found before anything is committed."""
    disk = mounted("size=20m")
    output = Path(shutil.copytree(exports["old"], disk / "out"))
    base = Base.read(output)
    base.check_writable()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ExportError, match="out: cannot be changed in place") as refused:
        base.check_writable()
    for folder in (output, output / "hf", output / "trtllm"):
        assert f"{folder}: no permission to write in this folder" in str(refused.value)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(number: signal.Signals, exports: dict[str, Path], tmp_path: Path) -> None:
    """Whenever it came: the export is the old one, or the next run finishes the new one. Nothing stays behind."""
    output = Path(shutil.copytree(exports["old"], tmp_path / "out"))
    staging = tmp_path / ".out.dist_export"
    command = [sys.executable, "-m", "dist_export", "refit", exports["save"], output, "--iteration", NEW]
    process = subprocess.Popen(
        [*map(str, command), "--num-processes", "2"], cwd=REPOSITORY, text=True, stderr=subprocess.PIPE
    )
    while process.poll() is None and not staging.exists():
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (128 + number, 0)
    if process.returncode and not any(name.startswith(".refit") for name in names(output)):
        assert weights(output) in (weights(exports["old"]), weights(exports["new"]))
    assert run("refit", exports["save"], output, "--iteration", NEW) == 0
    assert_same_export(output, exports["new"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
