"""A job that is started again after it had published: done where the export is the one asked for, refused otherwise."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_runs import contents, run, staged, weights

pytest.importorskip("torch")

LAYOUT = ("--tp", 2, "--dtype", "float32")
BOTH = (*LAYOUT, "--target", "trtllm", "--target", "hf")
DONE = "holds this export already: nothing to do"
Undisturbed = Callable[..., Path]


@pytest.mark.parametrize("torchrun", [False, True], ids=["local", "torchrun"])
@pytest.mark.parametrize("layout", [LAYOUT, BOTH], ids=["one", "both"])
def test_the_same_export_is_done(
    layout: tuple[object, ...], torchrun: bool, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output = Path(shutil.copytree(undisturbed(*layout), tmp_path / "out"))
    before = contents(output)
    for options in ((), ("--overwrite",)):
        again = run(long_checkpoint, output, *layout, "--resume", *options, torchrun=torchrun)
        assert again.code == 0, again.err
        assert again.out.count(DONE) == 1 and "exported" not in again.out
        assert contents(output) == before and staged(output) == []


@pytest.mark.parametrize("change", ["another layout", "another checkpoint", "a cut file", "a missing file", "old"])
def test_anything_else_is_refused(
    change: str, long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output, checkpoint = Path(shutil.copytree(undisturbed(*LAYOUT), tmp_path / "out")), tmp_path / "iter_0000010"
    shutil.copytree(long_checkpoint, checkpoint)  # with its times
    layout: tuple[object, ...] = LAYOUT
    assert run(checkpoint, output, *layout, "--resume").code == 0
    if change == "another layout":
        layout = ("--tp", 1, "--dtype", "float32")
    elif change == "another checkpoint":
        os.utime(checkpoint / "__0_0.distcp", ns=(1, 1))
    elif change == "a cut file":
        os.truncate(output / "rank1.safetensors", 5000)
    elif change == "a missing file":
        (output / "rank1.safetensors").unlink()
    else:
        manifest = json.loads((output / "export_manifest.json").read_text())
        del manifest["fingerprint"]
        (output / "export_manifest.json").write_text(json.dumps(manifest))
    before = contents(output)
    refused = run(checkpoint, output, *layout, "--resume")
    assert refused.code == 2
    assert "an export is there already; --overwrite replaces it" in refused.err
    assert contents(output) == before and staged(output) == []


def test_a_replacement_that_was_stopped_goes_on(
    long_checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """It was asked for, although what it replaces says that it is the same: that may be damaged."""
    output = Path(shutil.copytree(undisturbed(*LAYOUT), tmp_path / "out"))
    with (output / "rank0.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    options = (*LAYOUT, "--overwrite")
    assert run(long_checkpoint, output, *options, rank=0, point="written", action="kill").code == 3
    assert weights(output) != weights(undisturbed(*LAYOUT))
    again = run(long_checkpoint, output, *options, "--resume")
    assert again.code == 0 and DONE not in again.out, again.err
    assert weights(output) == weights(undisturbed(*LAYOUT))
