"""Legacy checkpoints hold the same tensors as torch_dist ones of the same real model, however they were saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch
from support.exports import export, fingerprints
from support.legacy import (
    ITERATION,
    as_classic,
    as_grouped_by_te,
    assert_same,
    expected_tensors,
    into_one_buffer,
    rank_files,
    save_again,
    save_models,
    stacked_by_te,
    unchanged,
)

from dist_export.checkpoint.legacy import read_common_state, read_index
from dist_export.checkpoint.open import open_checkpoint
from dist_export.errors import ExportError

MODELS: dict[str, dict[str, Any]] = {
    "gated": {"style": "llama", "tp": 2, "pp": 2, "vpp": 2},
    "tied": {"style": "gpt", "tp": 2, "pp": 2},
    "grouped": {"style": "mixtral", "tp": 2, "ep": 2, "grouped": True, "layers": 2},
    "sparse": {"style": "mixtral", "tp": 2, "ep": 2, "etp": 1, "layers": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("legacy")
    save_models(folder, MODELS)
    return folder


def index_of(save: Path):
    return read_index(save / ITERATION)


@pytest.mark.parametrize("name", MODELS)
def test_same_tensors_as_torch_dist(models: Path, name: str) -> None:
    assert_same(index_of(models / name / "legacy"), expected_tensors(models / name))


@pytest.mark.parametrize("name", ["gated", "grouped", "sparse"])
def test_same_export_as_torch_dist(models: Path, name: str, tmp_path: Path) -> None:
    options = ("--tp", 2, "--pp", 2)
    legacy = export(models / name / "legacy", tmp_path / "legacy", *options)
    twin = export(models / name / "torch_dist", tmp_path / "torch_dist", *options)
    for rank in range(4):
        file = f"rank{rank}.safetensors"
        assert fingerprints(legacy / file) == fingerprints(twin / file)
    assert (legacy / "config.json").read_bytes() == (twin / "config.json").read_bytes()


def test_one_buffer_for_all_weights_and_an_optimizer(models: Path, tmp_path: Path) -> None:
    save = save_again(models / "gated" / "legacy", tmp_path / "save", into_one_buffer)
    (save / ITERATION / "mp_rank_00_000" / "distrib_optim.pt").write_bytes(b"never opened")
    index = index_of(save)
    assert_same(index, expected_tensors(models / "gated"))
    assert index.ignored["optimizer state"].num_tensors == 4 + 1
    assert index.ignored["optimizer state"].num_bytes == 4 * 256 * 256 * 4 + len(b"never opened")
    assert index.num_weight_bytes == index_of(models / "gated" / "legacy").num_weight_bytes


@pytest.mark.parametrize("change", [unchanged, into_one_buffer])
@pytest.mark.parametrize("name", ["gated", "grouped"])
def test_files_from_before_the_zip_format(models: Path, name: str, change: Any, tmp_path: Path) -> None:
    save = save_again(models / name / "legacy", tmp_path / "s", change, _use_new_zipfile_serialization=False)
    assert_same(index_of(save), expected_tensors(models / name))


@pytest.mark.parametrize("change", [as_grouped_by_te, stacked_by_te])
def test_experts_of_transformer_engine(models: Path, change: Any, tmp_path: Path) -> None:
    save = save_again(models / "sparse" / "legacy", tmp_path / "save", change)
    assert_same(index_of(save), expected_tensors(models / "sparse"))


@pytest.mark.parametrize(
    ("version", "stack", "attention", "norm"),
    [
        (0, "transformer", "attention", "layernorm"),
        (1.0, "transformer", "attention", "layernorm"),
        (2.0, "encoder", "self_attention", "layernorm"),
        (3.0, "encoder", "self_attention", "norm"),
    ],
)
def test_classic_models(models: Path, tmp_path: Path, version: float, stack: str, attention: str, norm: str) -> None:
    change = as_classic(version=version, stack=stack, attention=attention, norm=norm)
    save = save_again(models / "tied" / "legacy", tmp_path / "save", change)
    index = index_of(save)
    assert_same(index, expected_tensors(models / "tied"))
    assert index.ignored["copy of the tied embeddings on the last pipeline stage"].num_tensors == 1
    if version < 2:
        legacy = export(save, tmp_path / "legacy", "--tp", 2)
        twin = export(models / "tied" / "torch_dist", tmp_path / "torch_dist", "--tp", 2)
        for rank in range(2):
            file = f"rank{rank}.safetensors"
            assert fingerprints(legacy / file) == fingerprints(twin / file)


def test_the_tied_head_on_the_last_stage_is_a_counted_copy(models: Path) -> None:
    index = index_of(models / "tied" / "legacy")
    assert "output_layer.weight" not in index.tensors
    copy = index.ignored["copy of the tied embeddings on the last pipeline stage"]
    assert (copy.num_tensors, copy.num_bytes) == (1, 256 * 64 * 2)


def test_what_training_saved_beside_the_weights(models: Path) -> None:
    checkpoint = open_checkpoint(models / "gated" / "legacy")
    assert checkpoint.iteration == 10
    assert checkpoint.arguments is not None
    assert checkpoint.arguments["num_layers"] == 4
    assert checkpoint.index.format == "legacy"
    assert set(read_common_state(checkpoint.index)) == {"args", "iteration", "checkpoint_version"}


def test_a_release_folder(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "gated" / "legacy" / ITERATION, tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert_same(open_checkpoint(tmp_path).index, expected_tensors(models / "gated"))


def test_the_older_file_name_and_folders_with_optimizer_state_only(models: Path, tmp_path: Path) -> None:
    save = shutil.copytree(models / "gated" / "legacy", tmp_path / "save")
    for path in rank_files(save):
        path.rename(path.with_name("model_rng.pt"))
        extra = path.parent.with_name(path.parent.name + "_000")
        extra.mkdir()
        (extra / "optim.pt").write_bytes(b"never opened")
    assert_same(index_of(save), expected_tensors(models / "gated"))


@pytest.mark.parametrize("name", ["gated", "tied"])
def test_without_arguments_the_folders_tell_the_layout(models: Path, name: str, tmp_path: Path) -> None:
    def without(state: dict[str, Any]) -> None:
        del state["args"]

    save = save_again(models / name / "legacy", tmp_path / "save", without)
    expected = expected_tensors(models / name)
    if name == "tied":  # nothing says that the head is a copy
        expected["output_layer.weight"] = expected["embedding.word_embeddings.weight"]
    assert_same(index_of(save), expected)


def test_a_lone_suffix_is_the_expert_rank_when_all_ranks_have_embeddings(models: Path, tmp_path: Path) -> None:
    def without(state: dict[str, Any]) -> None:
        del state["args"]

    save = save_again(models / "sparse" / "legacy", tmp_path / "save", without)
    assert_same(index_of(save), expected_tensors(models / "sparse"))


def test_state_of_layers_becomes_objects(models: Path, tmp_path: Path) -> None:
    def with_state(state: dict[str, Any]) -> None:
        state["model0"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.tensor([1, 2, 3], dtype=torch.uint8)

    index = index_of(save_again(models / "gated" / "legacy", tmp_path / "save", with_state))
    assert_same(index, expected_tensors(models / "gated"))
    place = index.objects["decoder.layers.1.mlp.linear_fc1._extra_state/mp_rank_01_001"]
    raw = index.path(place.file).read_bytes()[place.offset : place.offset + place.length]
    assert raw == bytes([1, 2, 3])
    assert len(index.objects) == 4


def test_dense_shards_that_megatron_never_wrote(models: Path, tmp_path: Path) -> None:
    def tp4(state: dict[str, Any]) -> None:
        state["args"].tensor_model_parallel_size = 4

    save = save_again(models / "sparse" / "legacy", tmp_path / "save", tp4)
    with pytest.raises(ExportError, match=r"(?s)mp_rank_02 is missing: .*0\.10 to 0\.17 never wrote them.*mp_rank_03"):
        index_of(save)
