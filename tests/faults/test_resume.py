"""Going on after a kill: little is read again, nothing is believed unchecked, and only the same export goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_runs import bytes_needed, bytes_read, run, staged, weights

torch = pytest.importorskip("torch")

LAYOUTS: dict[str, tuple[object, ...]] = {
    "copy": ("--tp", 2, "--dtype", "float32"),
    "cast": ("--tp", 2, "--dtype", "bfloat16"),
    "both targets": ("--tp", 2, "--dtype", "bfloat16", "--target", "trtllm", "--target", "hf"),
}
SMALL_TILES = ("--host-memory", "256k")
MOST_READ_AGAIN = 0.15
Undisturbed = Callable[..., Path]


@pytest.fixture(scope="module", params=LAYOUTS)
def killed_at_90_percent(
    request: pytest.FixtureRequest, long_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[object, ...], Path]:
    """(layout, output) of an export of two processes that was killed when it was at about 90 %. Copied, not changed.

    Both write at an even pace, and rank 0 kills itself when it has written 90 % of its share.
    """
    layout, folder = LAYOUTS[request.param], tmp_path_factory.mktemp("killed")
    probe = run(long_checkpoint, folder / "probe", *layout, *SMALL_TILES, count=True)
    assert probe.code == 0, probe.err
    shutil.rmtree(folder / "probe")
    writes = int(re.findall(r"rank 0 wrote (\d+) times", probe.out)[0])
    fault = {"rank": 0, "point": "transfer", "action": "kill", "after": int(0.9 * writes), "pace": 0.03}
    ended = run(long_checkpoint, folder / "out", *layout, *SMALL_TILES, **fault)
    assert ended.code == 3 and "rank 0 was killed" in ended.err, ended.err
    assert ended.seconds < 15
    assert [path.name for path in folder.iterdir()] == [".out.dist_export"]
    return layout, folder / "out"


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_killed_at_90_percent(
    num_processes: int, killed_at_90_percent: tuple[tuple[object, ...], Path], long_checkpoint: Path, tmp_path: Path,
    undisturbed: Undisturbed,
) -> None:  # fmt: skip
    layout, killed = killed_at_90_percent
    output, whole = tmp_path / "new" / "out", undisturbed(*layout)
    shutil.copytree(killed.parent, output.parent)
    ended = run(long_checkpoint, output, *layout, *SMALL_TILES, "--resume", num_processes=num_processes)
    assert ended.code == 0, ended.err
    assert weights(output) == weights(whole)
    assert staged(output) == []
    share = bytes_read(output) / bytes_needed(whole)
    print(f"read again: {share:.1%}")
    assert share <= MOST_READ_AGAIN


@pytest.fixture(scope="module")
def almost_done(long_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an export that was killed when everything had been written and most of it noted."""
    output = tmp_path_factory.mktemp("almost") / "out"
    fault = {"rank": 1, "point": "written", "action": "kill"}
    ended = run(long_checkpoint, output, *LAYOUTS["copy"], *SMALL_TILES, **fault, pace=0.03)
    assert ended.code == 3, ended.err
    return output


@pytest.fixture
def killed(almost_done: Path, tmp_path: Path) -> Path:
    """A copy of `almost_done` to go on with."""
    shutil.copytree(almost_done.parent, tmp_path / "killed")
    return tmp_path / "killed" / "out"


def journal_lines(output: Path) -> list[tuple[Path, list[int]]]:
    """(journal, [file, tensor, offset, length, checksum]) of every run noted."""
    return [
        (path, [int(part) for part in line.split()])
        for path in sorted(staged(output)[0].glob("journal/*.txt"))
        for line in path.read_text().splitlines()
    ]


def test_a_flipped_byte_is_noticed_and_just_its_run_is_done_again(
    long_checkpoint: Path, killed: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = killed
    again = Path(shutil.copytree(output.parent, tmp_path / "again")) / "out"
    _, (file, tensor, offset, length, _) = journal_lines(output)[3]
    flip(staged(output)[0] / f"rank{file}.safetensors", tensor, offset + length // 2)
    read = []
    for each in (again, output):
        ended = run(long_checkpoint, each, *LAYOUTS["copy"], *SMALL_TILES, "--resume")
        assert ended.code == 0, ended.err
        assert weights(each) == weights(undisturbed(*LAYOUTS["copy"]))
        read.append(bytes_read(each))
    assert 0 < read[1] - read[0] <= 2 * (64 << 10)  # at most the tiles that the run is made of


def flip(path: Path, tensor: int, offset: int) -> None:
    """Invert a byte of a tensor, counted in order of their places in the file."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = {k: v for k, v in json.loads(file.read(length)).items() if k != "__metadata__"}
        start = sorted(entry["data_offsets"][0] for entry in header.values())[tensor]
        file.seek(8 + length + start + offset)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_a_journal_cut_within_a_line_and_one_full_of_rubbish(
    long_checkpoint: Path, killed: Path, undisturbed: Undisturbed
) -> None:
    output = killed
    first, second = sorted(staged(output)[0].glob("journal/*.txt"))
    os.truncate(first, first.stat().st_size - 4)
    rubbish = b"\xff\x00 1 2 3\n0 0 0 99999999999999999 0\n9999 0 0 5 5\n0 9999 0 5 5\n0 0 0 0 0\n1 2 3\n"
    second.write_bytes(rubbish + second.read_bytes() + b"0 0 " + "²".encode() + b" 4 5\n")
    ended = run(long_checkpoint, output, *LAYOUTS["copy"], *SMALL_TILES, "--resume")
    assert ended.code == 0, ended.err
    assert weights(output) == weights(undisturbed(*LAYOUTS["copy"]))
    assert bytes_read(output) < MOST_READ_AGAIN * bytes_needed(output)


@pytest.mark.parametrize("damage", ["truncated", "missing", "longer", "no header"])
def test_a_staged_file_that_is_not_as_it_was_left(
    damage: str, long_checkpoint: Path, killed: Path, undisturbed: Undisturbed
) -> None:
    output = killed
    path = staged(output)[0] / "rank0.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "no header":
        with path.open("r+b") as file:
            file.write(bytes(200))
    else:
        os.truncate(path, path.stat().st_size // 2 if damage == "truncated" else path.stat().st_size + 77)
    ended = run(long_checkpoint, output, *LAYOUTS["copy"], "--resume")
    assert ended.code == 0, ended.err
    assert weights(output) == weights(undisturbed(*LAYOUTS["copy"]))


def test_another_export_does_not_go_on(long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    checkpoint = tmp_path / "iter_0000010"
    shutil.copytree(long_checkpoint, checkpoint)
    output = tmp_path / "out"
    fault = {"rank": 1, "point": "written", "action": "kill"}
    assert run(checkpoint, output, *LAYOUTS["copy"], **fault).code == 3
    before = sorted(path.name for path in staged(output)[0].iterdir())
    other = run(checkpoint, output, *LAYOUTS["cast"], "--resume")
    assert other.code == 2
    assert re.search(r"out: cannot resume, since what is exported has changed \(job\); start again without", other.err)
    os.utime(checkpoint / "__0_0.distcp", ns=(1, 1))
    changed = run(checkpoint, output, *LAYOUTS["copy"], "--resume")
    assert changed.code == 2
    assert re.search(r"what is exported has changed \(source\)", changed.err)
    assert not output.exists()
    assert sorted(path.name for path in staged(output)[0].iterdir()) == before  # a right command can still resume
    assert run(checkpoint, output, *LAYOUTS["copy"]).code == 0
    assert weights(output) == weights(undisturbed(*LAYOUTS["copy"]))


def test_killed_again_and_again(long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    output = tmp_path / "out"
    for attempt, (rank, num_processes) in enumerate([(0, 2), (2, 3), (0, 2)]):
        fault = {"rank": rank, "point": "transfer", "action": "kill", "after": 15, "pace": 0.01}
        options = (*LAYOUTS["copy"], *SMALL_TILES, "--resume")
        ended = run(long_checkpoint, output, *options, **fault, num_processes=num_processes)
        assert ended.code == 3, (attempt, ended.out, ended.err)
    ended = run(long_checkpoint, output, *LAYOUTS["copy"], "--resume")
    assert ended.code == 0, ended.err
    assert weights(output) == weights(undisturbed(*LAYOUTS["copy"]))
    assert bytes_read(output) < 0.9 * bytes_needed(undisturbed(*LAYOUTS["copy"]))


def test_resume_without_anything_to_resume(long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    output = tmp_path / "out"
    assert run(long_checkpoint, output, *LAYOUTS["copy"], "--resume").code == 0
    assert weights(output) == weights(undisturbed(*LAYOUTS["copy"]))
