"""Exports that are written on the nodes' own disks first: the same bytes, whatever is killed, lost or damaged."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_runs import Ended, bytes_needed, bytes_read, finish, run, staged, start, weights

pytest.importorskip("torch")

LAYOUT = ("--tp", 2, "--dtype", "float32", "--host-memory", "256k")
WHOLE = LAYOUT[:4]
MOST_READ = {"transfer": 0.7, "gather": 0.02}
Undisturbed = Callable[..., Path]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A node's own disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def export_by_way_of(disk: Path, checkpoint: Path, output: Path, *options: object, **fault: object) -> Ended:
    return run(checkpoint, output, *LAYOUT, "--local-staging", disk, *options, **fault)


@pytest.mark.parametrize("num_processes", [1, 3])
def test_the_same_bytes_and_nothing_left_on_the_node(
    num_processes: int, disk: Path, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output, both = tmp_path / "out", ("--target", "trtllm", "--target", "hf", "--sha256")
    ended = export_by_way_of(disk, long_checkpoint, output, *both, num_processes=num_processes)
    assert ended.code == 0, ended.err
    assert weights(output) == weights(undisturbed(*WHOLE, *both))
    assert list(disk.iterdir()) == staged(output) == []
    assert processes_of(output / "trtllm", "bytes_gathered") == processes_of(output / "trtllm", "bytes_written") > 0


def processes_of(folder: Path, statistic: str) -> int:
    manifest = json.loads((folder / "export_manifest.json").read_text())
    return sum(each[statistic] for each in manifest["run"]["processes"])


@pytest.mark.parametrize("again", ["with the disk", "without the disk", "the disk is empty"])
@pytest.mark.parametrize("point", ["transfer", "gather"])
def test_killed_and_resumed(
    point: str, again: str, disk: Path, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output, whole = tmp_path / "out", undisturbed(*WHOLE)
    after = {"transfer": 40, "gather": 12}[point]
    ended = export_by_way_of(disk, long_checkpoint, output, rank=1, point=point, action="kill", after=after, pace=0.02)
    assert ended.code == 3 and ended.seconds < 15, ended.err
    assert not output.exists() and len(list(disk.iterdir())) == 1
    if again == "the disk is empty":
        shutil.rmtree(disk)
        disk.mkdir()
    options = () if again == "without the disk" else ("--local-staging", disk)
    ended = run(long_checkpoint, output, *LAYOUT, "--resume", *options, num_processes=3)
    assert ended.code == 0, ended.err
    assert weights(output) == weights(whole)
    read = bytes_read(output) / bytes_needed(whole)
    print(f"killed in {point}, {again}: read again {read:.0%}")
    most = MOST_READ[point] if again == "with the disk" else {"transfer": 1.02, "gather": 0.95}[point]
    assert read <= most  # without the disk, what had been gathered counts
    if again == "with the disk":
        assert list(disk.iterdir()) == []


def test_a_run_that_starts_afresh_removes_what_an_earlier_one_left(
    disk: Path, long_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert export_by_way_of(disk, long_checkpoint, output, rank=0, point="written", action="kill").code == 3
    assert len(list(disk.iterdir())) == 1
    assert export_by_way_of(disk, long_checkpoint, output).code == 0
    assert list(disk.iterdir()) == []


def test_bytes_that_change_on_the_disk_are_noticed(disk: Path, long_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(long_checkpoint, output, *LAYOUT, "--local-staging", disk, rank=1, point="written", action="2")
    deadline = time.monotonic() + 30
    while b"dies at" not in (line := os.read(process.stdout.fileno(), 1 << 16)):  # type: ignore[union-attr]
        assert line and time.monotonic() < deadline
    (path,) = disk.glob(".dist_export-*/rank1.safetensors")
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    ended = finish(process)
    assert ended.code == 2
    assert "rank1.safetensors" in ended.err and "are not what rank 1 wrote there (checksum" in ended.err, ended.err
    assert not output.exists() and staged(output) == list(disk.iterdir()) == []


def test_folders_that_cannot_be(disk: Path, long_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    missing = export_by_way_of(disk / "missing", long_checkpoint, output)
    assert missing.code == 2 and "no such folder on" in missing.err
    output.mkdir()
    within = export_by_way_of(output, long_checkpoint, output)
    assert within.code == 2 and "must not be in OUTPUT" in within.err
    assert list(output.iterdir()) == staged(output) == []
