"""zarr checkpoints, written cell by cell, against the same model in torch_dist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.other_formats import exported, write_zarr, write_zarr_array
from support.small_models import LLAMA, small_model
from support.torch_dist import write_torch_dist

from dist_export.checkpoint.open import open_checkpoint
from dist_export.errors import ExportError

torch = pytest.importorskip("torch")
FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(LLAMA)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_same_export_as_torch_dist(tmp_path: Path, model: Any, parts: int) -> None:
    plain = exported(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args), tmp_path / "a", "--tp", 2)
    cells = write_zarr(tmp_path / "zarr", model.tensors, args=model.args, parts=parts)
    assert exported(cells, tmp_path / "b", "--tp", 2) == plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_element_types(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_model(LLAMA, dtype=dtype)
    plain = exported(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args), tmp_path / "a")
    assert exported(write_zarr(tmp_path / "zarr", model.tensors, args=model.args, parts=1), tmp_path / "b") == plain


def test_edge_cells_have_strides_of_whole_cells(tmp_path: Path, model: Any) -> None:
    tensor = model.tensors["embedding.word_embeddings.weight"]
    folder = write_zarr(tmp_path / "c", model.tensors, args=None)
    import shutil

    shutil.rmtree(folder / "embedding.word_embeddings.weight")
    write_zarr_array(folder / "embedding.word_embeddings.weight", tensor, (48, 20))
    index = open_checkpoint(folder).index
    chunks = {chunk.box.start: chunk for chunk in index.chunks("embedding.word_embeddings.weight")}
    assert chunks[0, 0].strides is None
    assert (chunks[48, 20].box.size, chunks[48, 20].strides) == ((16, 12), (40, 2))
    assert index.format == "zarr" and not index.chunks_are_records
    plain = write_torch_dist(tmp_path / "p", model.tensors, args=model.args)
    (folder / "common.pt").write_bytes((plain / "common.pt").read_bytes())
    assert exported(folder, tmp_path / "b") == exported(plain, tmp_path / "a")


def test_what_lies_beside_the_weights(tmp_path: Path, model: Any) -> None:
    folder = write_zarr(tmp_path / "c", {f"model.{n}": t for n, t in model.tensors.items()}, args=model.args)
    write_zarr_array(folder / f"optimizer.state.exp_avg.{FC1}", model.tensors[FC1].float(), (1, 96, 32))
    (folder / f"{FC1}.sync").mkdir()
    (folder / f"{FC1}.sync" / "lock").write_text("")
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.index.tensors) == set(model.tensors)
    assert checkpoint.index.ignored["optimizer state"].num_bytes == 2 * 96 * 32 * 4
    assert set(checkpoint.index.objects) == {"decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"}
    assert (checkpoint.arguments, checkpoint.iteration) == (model.args, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressor": {"id": "blosc"}}, "compressor is .*blosc.*decode the array with the zarr library"),
        ({"filters": [{"id": "delta"}]}, "filters is .*delta"),
        ({"order": "F"}, "order is 'F', expected 'C'"),
        ({"zarr_format": 3}, "zarr_format is 3, expected 2"),
        ({"dtype": ">f4"}, "dtype is '>f4'"),
        ({"dtype": [["a", "<f4"]]}, "dtype is "),
        ({"dimension_separator": "/"}, "dimension_separator is '/'"),
        ({"chunks": [1, 48, 0]}, "chunks is .*expected positive integers"),
        ({"chunks": [1, 48]}, "do not belong together"),
        ({"shape": [10**9, 10**9, 32]}, "4 cell files, expected 20833334000000000 of the grid"),
        ({"shape": "many"}, "shape is 'many'"),
        ({"shape": [2, 96, True]}, "expected positive integers"),
    ],
)
def test_arrays_that_cannot_be_read(tmp_path: Path, model: Any, changes: dict[str, Any], message: str) -> None:
    folder = write_zarr(tmp_path / "c", model.tensors, args=None)
    header = json.loads((folder / FC1 / ".zarray").read_text())
    (folder / FC1 / ".zarray").write_text(json.dumps(header | changes))
    with pytest.raises(ExportError, match=f"{FC1}.*{message}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"shape": ' + "9" * 5000 + "}"])
def test_hostile_headers(tmp_path: Path, model: Any, text: str) -> None:
    folder = write_zarr(tmp_path / "c", model.tensors, args=None)
    (folder / FC1 / ".zarray").write_text(text)
    with pytest.raises(ExportError, match=f"{FC1}/.zarray: not"):
        open_checkpoint(folder)


def test_cells_that_are_missing_cut_or_too_many(tmp_path: Path, model: Any) -> None:
    folder = write_zarr(tmp_path / "c", model.tensors, args=None)
    (folder / FC1 / "1.0.0").rename(folder / FC1 / "2.0.0")
    with pytest.raises(ExportError, match=r"cell 1.0.0 is missing"):
        open_checkpoint(folder)
    (folder / FC1 / "2.0.0").unlink()
    with pytest.raises(ExportError, match=r"3 cell files, expected 4 of the grid"):
        open_checkpoint(folder)
    (folder / FC1 / "1.0.0").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"cell 1.0.0 has 1 bytes, expected 3072"):
        open_checkpoint(folder)
    (folder / FC1 / "1.0.0").write_bytes(bytes(3073))
    with pytest.raises(ExportError, match=r"cell 1.0.0 has 3073 bytes, expected 3072"):
        open_checkpoint(folder)
