"""An output that is a mount point cannot be renamed: every config.json goes first and comes back last."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_runs import run, staged, weights, writing

pytest.importorskip("torch")

LAYOUT = ("--tp", 2, "--dtype", "float32")
BOTH = (*LAYOUT, "--target", "trtllm", "--target", "hf")
OLD = {"one": ("--tp", 1, "--dtype", "bfloat16"), "two": ("--target", "hf", "--target", "trtllm")}
Undisturbed = Callable[..., Path]


@pytest.fixture
def output(mounted: Callable[..., Path]) -> Path:
    """An empty file system."""
    return mounted("size=200m")


@pytest.mark.parametrize("layout", [LAYOUT, BOTH], ids=["one", "both"])
@pytest.mark.parametrize("old", [None, "one", "two"])
def test_export_to_a_mount_point(
    old: str | None, layout: tuple[object, ...], long_checkpoint: Path, output: Path, undisturbed: Undisturbed
) -> None:
    if old is not None:
        shutil.copytree(undisturbed(*OLD[old]), output, dirs_exist_ok=True)
        refused = run(long_checkpoint, output, *layout)
        assert refused.code == 2 and "an export is there already; --overwrite" in refused.err
        assert weights(output) == weights(undisturbed(*OLD[old]))
    ended = run(long_checkpoint, output, *layout, *(("--overwrite",) if old else ()))
    assert ended.code == 0, ended.err
    assert weights(output) == weights(undisturbed(*layout))
    assert staged(output) == []


@pytest.mark.parametrize("point", ["transfer", "finish", "config", "publish"])
def test_killed_before_publication_the_old_export_is_as_it_was(
    point: str, long_checkpoint: Path, output: Path, undisturbed: Undisturbed
) -> None:
    old = undisturbed(*OLD["one"])
    shutil.copytree(old, output, dirs_exist_ok=True)
    ended = run(long_checkpoint, output, *LAYOUT, "--overwrite", rank=0, point=point, action="kill")
    assert ended.code == 3 and ended.seconds < 15
    there = {name: data for name, data in weights(output).items() if not name.startswith(".dist_export")}
    assert there == weights(old)
    assert run(long_checkpoint, output, *LAYOUT, "--overwrite", "--resume").code == 0
    assert weights(output) == weights(undisturbed(*LAYOUT))
    assert staged(output) == []


@pytest.mark.parametrize("old", [None, "one"])
@pytest.mark.parametrize("step", [0, 1])
def test_killed_while_publishing_nothing_looks_whole_and_the_next_run_needs_no_leave(
    step: int, old: str | None, long_checkpoint: Path, output: Path, undisturbed: Undisturbed
) -> None:
    if old is not None:
        shutil.copytree(undisturbed(*OLD[old]), output, dirs_exist_ok=True)
    fault = {"rank": 0, "point": "inside", "action": "kill", "after": step}
    ended = run(long_checkpoint, output, *LAYOUT, *(("--overwrite",) if old else ()), **fault)
    assert ended.code == 3 and ended.seconds < 15
    assert not (output / "config.json").exists()
    ended = run(long_checkpoint, output, *LAYOUT)
    assert ended.code == 0, ended.err
    assert weights(output) == weights(undisturbed(*LAYOUT))
    assert staged(output) == []


def test_a_second_export_to_a_mount_point_is_refused(long_checkpoint: Path, output: Path) -> None:
    with writing(long_checkpoint, output, *LAYOUT, "--host-memory", "256k", pace=0.05):
        second = run(long_checkpoint, output, *LAYOUT, "--overwrite")
    assert second.code == 2 and "another export to this output is running" in second.err


def test_files_of_somebody_else_stay(long_checkpoint: Path, output: Path) -> None:
    (output / "thesis.tex").write_text("all my work")
    ended = run(long_checkpoint, output, *LAYOUT, "--overwrite")
    assert ended.code == 2 and "holds files that are not an export" in ended.err
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]
