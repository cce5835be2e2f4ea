"""Which folder a person means."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from support.small_models import LLAMA, small_model
from support.torch_dist import write_torch_dist

from dist_export.checkpoint.open import find_iteration, open_checkpoint
from dist_export.errors import ExportError


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """A --save folder with iterations 10, 20 (the latest whole one) and 30 (unfinished)."""
    for number in (10, 20, 30):
        (tmp_path / f"iter_{number:07d}").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20\n")
    return tmp_path


def test_the_tracker_says_which_is_whole(save: Path) -> None:
    assert find_iteration(save) == save / "iter_0000020"
    assert find_iteration(save, iteration=10) == save / "iter_0000010"
    assert find_iteration(save / "iter_0000030") == save / "iter_0000030"


def test_a_release_checkpoint(save: Path) -> None:
    (save / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(ExportError, match=r"release: no such folder; .* holds iter_0000010, .*iter_0000030"):
        find_iteration(save)
    (save / "release").mkdir()
    assert find_iteration(save) == save / "release"


@pytest.mark.parametrize("text", ["", "twenty", "-1", "2.5", "9" * 20, "20\n30"])
def test_a_tracker_with_something_else(save: Path, text: str) -> None:
    (save / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(ExportError, match="expected an iteration number or the word release"):
        find_iteration(save)


def test_iterations_that_are_not_there(save: Path) -> None:
    with pytest.raises(ExportError, match=r"iter_0000040: no such folder; .* holds iter_0000010, iter_0000020"):
        find_iteration(save, iteration=40)
    with pytest.raises(ExportError, match="no such file or folder"):
        find_iteration(save / "other")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"not a Megatron checkpoint \(no latest_checkpointed_iteration.txt, no metadata.json\)"),
        ({"mp_rank_00": ""}, "legacy torch format|legacy"),
        ({".metadata": "x"}, "has .metadata but no metadata.json, which Megatron writes last: the save did not finish"),
        ({"metadata.json": "[]"}, "metadata.json names no format that can be read"),
        ({"metadata.json": "{"}, "metadata.json names no format that can be read"),
        ({"metadata.json": '{"sharded_backend": "torch_dist"}'}, r"\.metadata: No such file .*unfinished or not all"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("common", ["file", "record"])
def test_what_training_saved_beside_the_weights(tmp_path: Path, common: str) -> None:
    model = small_model(LLAMA)
    folder = tmp_path / "iter_0000010"
    write_torch_dist(folder, model.tensors, args=model.args, common=common)  # type: ignore[arg-type]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.arguments == model.args
    assert checkpoint.iteration == 10
    assert (folder / "common.pt").exists() is (common == "file")


def test_no_arguments(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_torch_dist(tmp_path / "c", small_model(LLAMA).tensors, args=None))
    assert (checkpoint.arguments, checkpoint.iteration) == (None, 10)
