"""``.metadata`` to chunk table: shapes, boxes and places of real records, checked by reading the bytes there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.exports import raw_bytes  # noqa: E402
from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import megatron_chunks, read_metadata, write_metadata, write_torch_dist  # noqa: E402

from dist_export.checkpoint.torch_dist import is_torch_dist, read_common_state, read_index  # noqa: E402
from dist_export.checkpoint.torch_save import read_record  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402

MODEL = small_model(LLAMA)
QKV = "decoder.layers.self_attention.linear_qkv.weight"
OTHERS = {
    "optimizer.state.exp_avg.output_layer.weight": torch.zeros(64, 32),
    "chained_0.optimizer.state.exp_avg_sq.output_layer.weight": torch.zeros(64, 32),
    "rng_state": torch.zeros(5),
    "decoder.rotary_pos_emb.inv_freq": torch.zeros(4),
}


OBJECTS = ["decoder.layers.mlp.linear_fc1._extra_state/shard_0_2", "rng_state/shard_0.0_1.1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_torch_dist(
        tmp_path / "c", MODEL.tensors | OTHERS, args=MODEL.args, chunks=_chunks, prefix="model.",
        extra_objects={name: [b"x"] for name in OBJECTS},
    )  # fmt: skip


def _chunks(name: str, tensor: torch.Tensor) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    if name in OTHERS:
        return [(0, (0,) * tensor.dim(), tuple(tensor.shape))]
    return list(megatron_chunks(tp=2, pp=2)(name, tensor))


def test_every_chunk_is_where_the_table_says(folder: Path) -> None:
    assert is_torch_dist(folder)
    index = read_index(folder)
    assert index.shapes() == {name: (tuple(t.shape), "bfloat16") for name, t in MODEL.tensors.items()}
    assert index.num_chunks == sum(info.num_chunks for info in index.tensors.values())
    for name, tensor in MODEL.tensors.items():
        covered = torch.zeros(tensor.shape, dtype=torch.int)
        for chunk in index.chunks(name):
            box = tuple(slice(a, b) for a, b in zip(chunk.box.start, chunk.box.stop, strict=True))
            covered[box] += 1
            data = index.path(chunk.file).read_bytes()
            record = read_record(lambda at, size, d=data: d[at : at + size], chunk.offset, chunk.length, origin="test")
            assert (record.dtype, record.shape) == ("bfloat16", chunk.box.size)
            size = tensor[box].numel() * 2
            assert data[record.offset : record.offset + size] == raw_bytes(tensor[box])
        assert (covered == 1).all()


def test_chunks_of_a_box_are_those_that_touch_it(folder: Path) -> None:
    from dist_export.tensors.boxes import Box

    index = read_index(folder)
    boxes = [chunk.box for chunk in index.chunks(QKV)]
    assert sorted(box.start for box in boxes) == list(itertools.product((0, 1), (0, 32), (0,)))
    touching = index.chunks(QKV, Box((1, 31, 0), (1, 2, 1)))
    assert sorted(chunk.box.start for chunk in touching) == [(1, 0, 0), (1, 32, 0)]
    assert index.chunks(QKV, Box((1, 32, 0), (1, 1, 1)))[0].box.start == (1, 32, 0)


def test_what_is_left_out_has_a_reason(folder: Path) -> None:
    index = read_index(folder)
    assert {reason: (what.num_tensors, what.num_bytes) for reason, what in index.ignored.items()} == {
        "optimizer state": (2, 2 * 64 * 32 * 4),
        "training state": (1, 20),
        "rotary table, computed by the target": (1, 16),
    }
    assert list(index.objects) == OBJECTS


Change = Callable[[Path], None]


def _edit(change: Callable[..., None]) -> Change:
    def edit(folder: Path) -> None:
        metadata = read_metadata(folder)
        entry = metadata.state_dict_metadata["model." + QKV]
        places = {i: info for i, info in metadata.storage_data.items() if i.fqn == "model." + QKV}
        change(metadata, entry, places)
        write_metadata(folder, metadata)

    return edit


def _overlapping(metadata: object, entry: object, places: object) -> None:
    first, *_ = entry.chunks  # type: ignore[attr-defined]
    first.sizes = torch.Size((1, 33, 32))


def _outside(metadata: object, entry: object, places: object) -> None:
    entry.size = torch.Size((2, 60, 32))  # type: ignore[attr-defined]


def _other_rank(metadata: object, entry: object, places: object) -> None:
    entry.size = torch.Size((128, 32))  # type: ignore[attr-defined]


def _no_chunks(metadata: object, entry: object, places: object) -> None:
    entry.chunks = []  # type: ignore[attr-defined]


def _elsewhere(name: str) -> Callable[..., None]:
    def change(metadata: object, entry: object, places: dict[object, object]) -> None:
        next(iter(places.values())).relative_path = name  # type: ignore[attr-defined]

    return change


def _offset(value: int) -> Callable[..., None]:
    def change(metadata: object, entry: object, places: dict[object, object]) -> None:
        next(iter(places.values())).offset = value  # type: ignore[attr-defined]

    return change


def _short(metadata: object, entry: object, places: dict[object, object]) -> None:
    next(iter(places.values())).length = 100  # type: ignore[attr-defined]


def _twice(metadata: object, entry: object, places: dict[object, object]) -> None:
    metadata.state_dict_metadata["module." + QKV] = entry  # type: ignore[attr-defined]
    for index, info in places.items():
        moved = type(index)("module." + QKV, index.offset)  # type: ignore[attr-defined, call-arg]
        metadata.storage_data[moved] = info  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_overlapping, r"linear_qkv.weight: boxes .* overlap"),
        (_outside, r"linear_qkv.weight: box \[0:1, 32:64, 0:32\] is outside the shape \[2, 60, 32\]"),
        (_other_rank, r"linear_qkv.weight: a chunk has 3 dims, expected those of the shape \[128, 32\]"),
        (_no_chunks, r"linear_qkv.weight: 4096 of 4096 elements are not covered"),
        (_elsewhere("../secret"), r"weight is said to be in '../secret', which is not a file of this folder"),
        (_elsewhere("/etc/passwd"), "is said to be in '/etc/passwd'"),
        (_elsewhere(".."), r"is said to be in '\.\.'"),
        (_elsewhere("__9_0.distcp"), "cannot be read: __9_0.distcp: No such file"),
        (_offset(-1), r"is said to be at -1 with \d+ bytes"),
        (_offset(1 << 40), r"has \d+ bytes, needs 10995\d+; the file is truncated"),
        (_short, r"linear_qkv.weight: chunk .* of bfloat16 cannot fit in its record of 100 bytes"),
        (_twice, r"linear_qkv.weight is there twice, with and without a model. or module. prefix"),
    ],
)
def test_metadata_that_contradicts_itself(folder: Path, change: Callable[..., None], message: str) -> None:
    _edit(change)(folder)
    with pytest.raises(ExportError, match=message):
        read_index(folder)


def test_no_model_in_it(tmp_path: Path) -> None:
    folder = write_torch_dist(tmp_path / "c", OTHERS, args=None)
    with pytest.raises(ExportError, match="holds no model tensors"):
        read_index(folder)


@pytest.mark.parametrize("value", [[1, 2], "text", [{"a": 1}, {"b": 2}]])
def test_a_common_state_of_another_kind(folder: Path, value: object) -> None:
    torch.save(value, folder / "common.pt")
    with pytest.raises(ExportError, match=r"common.pt: the common state is a (list|str), expected a dictionary"):
        read_common_state(read_index(folder))


def test_replicas_of_a_chunk_count_once(folder: Path) -> None:
    metadata = read_metadata(folder)
    metadata.state_dict_metadata["model." + QKV].chunks *= 2
    write_metadata(folder, metadata)
    assert len(read_index(folder).chunks(QKV)) == 4


def test_real_checkpoints_of_megatron(megatron_checkpoint: Callable[..., Path]) -> None:
    pytest.importorskip("megatron.core")
    from support.megatron_checkpoints import latest_iteration, reference_weights

    folder = latest_iteration(megatron_checkpoint(tp=2, pp=1, per_layer=True, optimizer=True, vocab=257))
    index = read_index(folder)
    reference = reference_weights(folder)
    assert {name: shape for name, (shape, _) in index.shapes().items()} == {
        name: tuple(tensor.shape) for name, tensor in reference.items()
    }
    assert index.ignored["optimizer state"].num_tensors > 3 * len(reference) - 1
    assert np.all(index._places[:, 2] > 0)
