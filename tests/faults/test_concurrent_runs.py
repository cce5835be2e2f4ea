"""Two exports into one output, and sources and disks that change while an export runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_runs import finish, run, staged, start, wait_until_writing, weights, writing

pytest.importorskip("torch")

LAYOUT = ("--tp", 2, "--dtype", "float32")
SLOW = (*LAYOUT, "--host-memory", "256k")
Undisturbed = Callable[..., Path]


def test_a_second_export_is_refused_at_once_while_the_first_goes_on(
    long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = tmp_path / "out"
    with writing(long_checkpoint, output, *SLOW, pace=0.05) as first:
        second = run(long_checkpoint, output, *LAYOUT, "--overwrite")
        assert first.poll() is None
        assert second.code == 2
        assert len(second.causes) == 1 and "another export to this output is running (process " in second.causes[0]
        assert second.seconds < 2
        resumed = run(long_checkpoint, output, *LAYOUT, "--resume")
        assert resumed.code == 2 and "another export to this output is running" in resumed.err
        assert finish(first).code == 0
    assert weights(output) == weights(undisturbed(*LAYOUT))
    assert staged(output) == []


def test_the_lease_of_a_killed_owner_is_taken_over_at_once(
    long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = tmp_path / "out"
    with writing(long_checkpoint, output, *SLOW, pace=0.2) as first:
        os.killpg(first.pid, signal.SIGKILL)
        finish(first)
    assert (staged(output)[0] / "lease.json").exists()
    second = run(long_checkpoint, output, *LAYOUT)
    assert second.code == 0, second.err
    assert second.seconds < 3
    assert weights(output) == weights(undisturbed(*LAYOUT))
    assert staged(output) == []


def foreign_lease(output: Path) -> Path:
    """A lease that a run on another machine left or renews."""
    folder = output.parent / f".{output.name}.dist_export"
    folder.mkdir()
    lease = folder / "lease.json"
    lease.write_text(json.dumps({"token": "abc", "host": "elsewhere", "boot": "x", "pid": 1, "started": 1, "beat": 0}))
    return lease


def test_the_lease_of_another_machine_is_taken_over_when_it_stands_still(
    long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = tmp_path / "out"
    foreign_lease(output)
    ended = run(long_checkpoint, output, *LAYOUT)
    assert ended.code == 0, ended.err
    assert 9 < ended.seconds < 30
    assert weights(output) == weights(undisturbed(*LAYOUT))
    assert staged(output) == []


def test_the_lease_of_another_machine_is_respected_while_it_changes(long_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    lease = foreign_lease(output)
    stop = threading.Event()

    def renew() -> None:
        content = json.loads(lease.read_text())
        while not stop.wait(0.5):
            content["beat"] += 1
            lease.write_text(json.dumps(content))

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        ended = run(long_checkpoint, output, *LAYOUT)
    finally:
        stop.set()
        renewing.join()
    assert ended.code == 2
    assert "another export to this output is running (process 1 on elsewhere)" in ended.err
    assert ended.seconds < 3
    assert lease.exists()


def test_of_several_that_find_a_dead_lease_one_exports(
    long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = tmp_path / "out"
    assert run(long_checkpoint, output, *LAYOUT, rank=0, point="files created", action="kill").code == 3
    takers = [start(long_checkpoint, output, *SLOW, pace=0.05) for _ in range(3)]
    ended = [finish(taker) for taker in takers]
    assert sorted(each.code for each in ended) == [0, 2, 2], [each.err for each in ended]
    refusals = [each.causes for each in ended if each.code]
    assert all(len(causes) == 1 and "another export to this output" in causes[0] for causes in refusals), refusals
    assert weights(output) == weights(undisturbed(*LAYOUT))
    assert staged(output) == []


def test_a_source_file_that_shrinks_while_it_is_read(long_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000010"
    shutil.copytree(long_checkpoint, checkpoint)
    output = tmp_path / "new" / "out"
    output.parent.mkdir()
    with writing(checkpoint, output, *SLOW, pace=0.05) as process:
        os.truncate(checkpoint / "__0_0.distcp", 1_000_000)
        since = time.monotonic()
        ended = finish(process, since=since)
    assert ended.code == 2
    assert len(ended.causes) == 1, ended.err
    assert "__0_0.distcp: ends at byte" in ended.causes[0] and "cut short while the export ran" in ended.causes[0]
    assert ended.seconds < 5
    assert list(output.parent.iterdir()) == []


def test_a_source_file_that_disappears_before_it_is_opened(long_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000010"
    shutil.copytree(long_checkpoint, checkpoint)
    output = tmp_path / "new" / "out"
    output.parent.mkdir()
    process = start(checkpoint, output, *SLOW, rank=0, point="files created", action="1.5")
    assert process.stdout is not None and "files created" in process.stdout.readline()
    (checkpoint / "__0_0.distcp").unlink()
    ended = finish(process)
    assert ended.code == 2
    assert len(ended.causes) == 1 and "__0_0.distcp: No such file or directory" in ended.causes[0], ended.err
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("fault", ["removed", "rewritten"])
def test_a_checkpoint_that_changes_while_it_is_exported_is_not_published(
    fault: str, long_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint, output = tmp_path / "iter_0000010", tmp_path / "exports" / "out"
    output.parent.mkdir()
    shutil.copytree(long_checkpoint, checkpoint)
    process = start(checkpoint, output, *SLOW, pace=0.05)
    wait_until_writing(process)
    time.sleep(0.3)  # the other rank has opened it too, so that reading it goes on
    file = checkpoint / "__0_0.distcp"
    data = file.read_bytes()
    file.unlink()
    if fault == "rewritten":
        file.write_bytes(data)
    ended = finish(process)
    assert ended.code == 2
    expected = "__0_0.distcp: No such file" if fault == "removed" else "files changed during the export"
    assert len(ended.causes) == 1 and expected in ended.causes[0], ended.err
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("point", ["moved", "config"])
def test_disk_full_when_only_the_configuration_is_missing(
    point: str, long_checkpoint: Path, mounted: Callable[..., Path], undisturbed: Undisturbed
) -> None:
    disk = mounted("size=60m")
    output = disk / "out"
    shutil.copytree(undisturbed("--tp", 1, "--dtype", "bfloat16"), output)
    before = weights(output)
    fault = {"rank": 0, "point": point, "action": "fill disk", "file": str(disk / "filler")}
    ended = run(long_checkpoint, output, *LAYOUT, "--overwrite", **fault)
    assert ended.code == 2
    assert len(ended.causes) == 1 and ".json: cannot write: " in ended.causes[0], ended.err
    assert weights(output) == before
    (disk / "filler").unlink()
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert run(long_checkpoint, output, *LAYOUT, "--overwrite").code == 0
    assert weights(output) == weights(undisturbed(*LAYOUT))


def test_a_disk_too_small_for_the_files(long_checkpoint: Path, mounted: Callable[..., Path]) -> None:
    disk = mounted("size=8m")
    ended = run(long_checkpoint, disk / "out", *LAYOUT)
    assert ended.code == 2
    assert len(ended.causes) == 1 and "cannot write: the disk is full; free space" in ended.causes[0], ended.err
    assert list(disk.iterdir()) == []


def test_a_disk_without_inodes(long_checkpoint: Path, mounted: Callable[..., Path]) -> None:
    disk = mounted("size=60m,nr_inodes=6")
    ended = run(long_checkpoint, disk / "out", *LAYOUT)
    assert ended.code == 2
    assert len(ended.causes) == 1 and "cannot" in ended.causes[0] and "Traceback" not in ended.err, ended.err
    assert list(disk.iterdir()) == []


def test_read_only_output(long_checkpoint: Path, mounted: Callable[..., Path]) -> None:
    disk = mounted("size=60m,ro")
    ended = run(long_checkpoint, disk / "out", *LAYOUT)
    assert ended.code == 2
    assert len(ended.causes) == 1 and "out: no permission to write in" in ended.causes[0], ended.err
