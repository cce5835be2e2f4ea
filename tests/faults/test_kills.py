"""Any rank killed at any step of a real export: all processes end soon, the cause is said once, nothing half looks
whole, the earlier export stays, and the next run gives the very bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_runs import (
    MOST_SECONDS,
    Ended,
    bytes_read,
    contents,
    finish,
    is_alive,
    run,
    staged,
    start,
    weights,
    writing,
)

pytest.importorskip("torch")

LAYOUT = ("--tp", 2, "--dtype", "float32")
OTHER = ("--tp", 1, "--dtype", "bfloat16")
"""What the earlier export was made with."""

STEPS = {
    "agreement": 0, "agreed": 0, "before files": 0, "files created": 0, "transfer": 0, "written": 0, "report": 0,
}  # fmt: skip
LAST_STEPS = ("finish", "moved", "manifest", "config", "publish", "replace")
Undisturbed = Callable[..., Path]


def check_failure(ended: Ended, cause: str, code: int) -> None:
    """One cause, the right exit code, and soon."""
    assert ended.code == code, ended.out + ended.err
    assert len(ended.causes) == 1 and re.search(cause, ended.causes[0]), ended.err
    assert ended.seconds < MOST_SECONDS
    print(f"all gone after {ended.seconds:.2f} s")


def check_leftovers(output: Path) -> None:
    """A hidden folder without its configuration, or a whole export."""
    for folder in staged(output):
        for config in folder.rglob("config.json"):
            files = {p.name for p in config.parent.iterdir()}
            ranks = json.loads(config.read_text())["mapping"]["world_size"]
            assert {f"rank{rank}.safetensors" for rank in range(ranks)} | {"export_manifest.json"} <= files


def check_recovery(checkpoint: Path, output: Path, whole: Path, *options: object) -> None:
    """The next run succeeds, with the right bytes, and leaves nothing beside them."""
    ended = run(checkpoint, output, *LAYOUT, *options)
    assert ended.code == 0, ended.err
    assert weights(output) == weights(whole)
    assert staged(output) == []


CASES = [(rank, step) for rank in (0, 1) for step in STEPS] + [(0, step) for step in LAST_STEPS]


@pytest.mark.parametrize(("rank", "step"), CASES)
def test_killed_rank(rank: int, step: str, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed(*OTHER), output)
    before = contents(output)
    after = {"transfer": 5}.get(step, 0)
    ended = run(long_checkpoint, output, *LAYOUT, "--overwrite", rank=rank, point=step, action="kill", after=after)
    check_failure(ended, rf"rank {rank} was killed by signal 9 \(SIGKILL\); out of memory\?", 3)
    assert contents(output) == before
    check_leftovers(output)
    resume = ("--resume",) if CASES.index((rank, step)) % 2 else ()
    check_recovery(long_checkpoint, output, undisturbed(*LAYOUT), "--overwrite", *resume)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_late_in_the_transfer(
    rank: int, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = tmp_path / "out"
    fault = {"rank": rank, "point": "transfer", "action": "kill", "after": 80, "pace": 0.002}
    ended = run(long_checkpoint, output, *LAYOUT, "--host-memory", "128k", **fault)
    check_failure(ended, f"rank {rank} was killed", 3)
    assert not output.exists()
    check_leftovers(output)
    check_recovery(long_checkpoint, output, undisturbed(*LAYOUT), "--resume")
    assert bytes_read(output) < 0.9 * bytes_read(undisturbed(*LAYOUT))


@pytest.mark.parametrize(("rank", "point"), [(0, "published"), (0, "end"), (1, "end")])
def test_killed_after_publication(
    rank: int, point: str, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed(*OTHER), output)
    ended = run(long_checkpoint, output, *LAYOUT, "--overwrite", rank=rank, point=point, action="kill")
    check_failure(ended, f"rank {rank} was killed", 3)
    assert weights(output) == weights(undisturbed(*LAYOUT))
    assert staged(output) == []


def test_killed_between_the_two_renames_where_folders_cannot_be_exchanged(
    long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed(*OTHER), output)
    fault = {"rank": 0, "point": "between renames", "action": "kill", "no_exchange": True}
    check_failure(run(long_checkpoint, output, *LAYOUT, "--overwrite", **fault), "rank 0 was killed", 3)
    assert not output.exists()
    ended = run(long_checkpoint, output, *LAYOUT)  # without --overwrite: the earlier export comes back, and stays
    assert ended.code == 2 and "an export is there already; --overwrite" in ended.err
    assert weights(output) == weights(undisturbed(*OTHER))
    check_recovery(long_checkpoint, output, undisturbed(*LAYOUT), "--overwrite")


def test_two_renames_replace_an_export_too(long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed(*OTHER), output)
    assert run(long_checkpoint, output, *LAYOUT, "--overwrite", no_exchange=True).code == 0
    assert weights(output) == weights(undisturbed(*LAYOUT))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_launching_process(
    num_processes: int, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = tmp_path / "out"
    with writing(long_checkpoint, output, *LAYOUT, pace=0.2, num_processes=num_processes) as process:
        process.kill()
        ended = finish(process)
    assert ended.code == -signal.SIGKILL
    assert ended.seconds < MOST_SECONDS
    print(f"all gone after {ended.seconds:.2f} s")
    assert not output.exists()
    check_recovery(long_checkpoint, output, undisturbed(*LAYOUT), "--resume")


@pytest.mark.parametrize("rank", [0, 1])
def test_bug_in_a_rank(rank: int, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    output = tmp_path / "out"
    fault = {"rank": rank, "point": "transfer", "action": "raise", "after": 3, "pace": 0.01}
    ended = run(long_checkpoint, output, *LAYOUT, **fault)
    check_failure(ended, f"internal error: rank {rank}: Traceback", 1)
    assert ended.err.count("KeyError: 'a bug in this rank'") == 1
    assert ended.seconds < 5
    assert not output.exists()
    check_recovery(long_checkpoint, output, undisturbed(*LAYOUT), "--resume")


def test_stalled_ranks(long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    outputs = [tmp_path / f"out{rank}" for rank in range(2)]
    faults = [{"rank": rank, "point": "transfer", "action": "stop", "after": 3} for rank in range(2)]
    both = [start(long_checkpoint, out, *LAYOUT, **fault) for out, fault in zip(outputs, faults, strict=True)]
    for rank, (process, output) in enumerate(zip(both, outputs, strict=True)):
        ended = finish(process)
        check_failure(ended, rf"rank {rank} stopped responding \(killed\?\)", 3)
        assert not output.exists()
        pid = int(re.findall(r"process (\d+)", ended.out)[0])
        assert not is_alive(pid)
        check_recovery(long_checkpoint, output, undisturbed(*LAYOUT), "--resume")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_stopped_by_a_signal(
    number: signal.Signals, code: int, num_processes: int, long_checkpoint: Path, tmp_path: Path,
    undisturbed: Undisturbed,
) -> None:  # fmt: skip
    output = tmp_path / "out"
    options = (*LAYOUT, "--host-memory", "256k")
    with writing(long_checkpoint, output, *options, pace=0.1, num_processes=num_processes) as process:
        since = time.monotonic()
        process.send_signal(number) if number == signal.SIGTERM else os.killpg(process.pid, number)
        ended = finish(process, since=since)
    assert ended.code == code
    assert len(ended.causes) == 1 and f"stopped by {number.name}" in ended.causes[0], ended.err
    assert ended.seconds < 3
    assert not output.exists()
    assert len(staged(output)) == 1
    check_recovery(long_checkpoint, output, undisturbed(*LAYOUT), "--resume")


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_killed_rank(rank: int, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed(*OTHER), output)
    before = contents(output)
    fault = {"rank": rank, "point": "transfer", "action": "kill", "after": 20, "pace": 0.02}
    ended = run(long_checkpoint, output, *LAYOUT, "--overwrite", "--host-memory", "256k", torchrun=True, **fault)
    check_failure(ended, rf"rank {rank} stopped responding \(killed\?\)", 1)
    assert contents(output) == before
    check_leftovers(output)
    check_recovery(long_checkpoint, output, undisturbed(*LAYOUT), "--overwrite", "--resume")


def test_torchrun_killed_rank_0_before_publication(
    long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = tmp_path / "out"
    fault = {"rank": 0, "point": "publish", "action": "kill"}
    ended = run(long_checkpoint, output, *LAYOUT, torchrun=True, **fault)
    check_failure(ended, r"rank 0 stopped responding \(killed\?\)", 1)
    assert not output.exists()
    check_recovery(long_checkpoint, output, undisturbed(*LAYOUT))


def test_torchrun_stopped_by_a_scheduler(long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    output = tmp_path / "out"
    options = (*LAYOUT, "--host-memory", "256k")
    with writing(long_checkpoint, output, *options, pace=0.3, torchrun=True) as process:
        since = time.monotonic()
        process.terminate()
        ended = finish(process, since=since)
    assert ended.code != 0
    assert len(ended.causes) == 1 and "stopped by SIGTERM" in ended.causes[0], ended.err
    assert ended.seconds < 8
    assert not output.exists()
    check_recovery(long_checkpoint, output, undisturbed(*LAYOUT), "--resume")
