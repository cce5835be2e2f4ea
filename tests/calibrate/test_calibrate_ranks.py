"""Calibration over tensor- and pipeline-parallel ranks: what one process finds, and how it is refused and fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from support.exports import REPOSITORY, fingerprints

from dist_export.api import Source, open_model
from dist_export.calibrate.layout import Layout, choose_layout
from dist_export.cli import main
from dist_export.convert.sources import SourceFiles
from dist_export.errors import ExportError
from dist_export.tensors.boxes import Box

torch = pytest.importorskip("torch")
pytest.importorskip("modelopt", reason="calibration is ModelOpt's")
pytest.importorskip("megatron.core")
safetensors_torch = pytest.importorskip("safetensors.torch")

PROGRAM = Path(__file__).with_name("calibrate_over_ranks.py")
SCHEMES = ("fp8", "int8_sq", "int4_awq", "nvfp4")
SMOOTHED = ("int8_sq", "int4_awq")
ROUNDING = 1e-5
"""Of float32, relative: row-parallel linears add up in another order, and the sums go through two layers."""
OMP = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checkpoint(megatron_checkpoint: Callable[..., Path]) -> Path:
    """Of two tensor-parallel ranks, in float32."""
    return megatron_checkpoint(tp=2, dtype="float32", hidden=256, heads=8, kv_groups=4, ffn=256, layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ids.txt"
    ids = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text("\n".join(" ".join(map(str, row)) for row in ids))
    return path


@pytest.fixture(scope="module")
def files(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SCHEME.TP.PP.safetensors and .json of every scheme on one rank and on four, and of one that fails."""
    folder = tmp_path_factory.mktemp("files")
    asked = [f"{scheme}:{layout}:{data}" for scheme in SCHEMES for layout in ("1:1", "2:2")]
    command = [sys.executable, PROGRAM, checkpoint, folder, *asked, "fp8:2:1:missing.txt"]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=os.environ | OMP)
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_four_ranks_find_what_one_finds(scheme: str, files: Path) -> None:
    """tp 2 x pp 2: amax of weights that are not smoothed bit for bit, all else but for rounding."""
    one, four = (safetensors_torch.load_file(files / f"{scheme}.{layout}.safetensors") for layout in ("1.1", "2.2"))
    assert one.keys() == four.keys()
    for name, value in one.items():
        assert (four[name].shape, four[name].dtype) == (value.shape, value.dtype), name
        if name.endswith("weight_quantizer._amax") and scheme not in SMOOTHED:
            assert torch.equal(four[name], value), name
        torch.testing.assert_close(four[name], value, rtol=ROUNDING, atol=0, msg=name)


def test_each_rank_reads_its_part(files: Path) -> None:
    """Of the linears and the embedding, which are all but a thousandth of the model."""
    (one,) = json.loads((files / "fp8.1.1.json").read_text())
    four = json.loads((files / "fp8.2.2.json").read_text())
    assert [each["code"] for each in (one, *four)] == [0] * 5
    assert all(0.24 < each["bytes_read"] / one["bytes_read"] < 0.27 for each in four)
    assert [bool(each["text"].count("calibrated on 120 tokens")) for each in four] == [True, False, False, False]


def test_every_rank_fails(files: Path) -> None:
    """Rank 0 cannot read the data: it says so, once, and no rank ends well."""
    told = json.loads((files / "fp8.2.1.json").read_text())
    assert [each["code"] for each in told] == [2, 3]
    assert "dist-export: error: rank 0: missing.txt: cannot be read" in told[0]["text"]
    assert "error" not in told[1]["text"]
    assert not (files / "fp8.2.1.safetensors").exists()


def test_exports_are_equal_where_the_amax_are(files: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Weights in all bytes; scales of activations in those linears whose amax are."""
    paths = [files / f"fp8.{layout}.safetensors" for layout in ("1.1", "2.2")]
    for name, path in zip("ab", paths, strict=True):
        asked = ["--quantization", "fp8", "--calibration", str(path), "--num-processes", "1"]
        assert main(["export", str(checkpoint), str(tmp_path / name), *asked]) == 0
    one, four = (fingerprints(tmp_path / name / "rank0.safetensors") for name in "ab")
    different = {name for name in one if one[name] != four[name]}
    assert one.keys() == four.keys()
    assert all(name.endswith("activation_scaling_factor") for name in different)
    found = [safetensors_torch.load_file(path) for path in paths]
    unequal = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    assert len(different) <= 2 * len(unequal)  # one amax of gate and up makes two scales


def test_torchrun(files: Path, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Two pipeline stages compute what one process does: the same file, byte for byte."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "dist_export", "calibrate", checkpoint, tmp_path / "fp8", "--data", data, "--pp", "2"]
    process = subprocess.run(command, cwd=REPOSITORY, env=os.environ | OMP, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    assert "held by 2 processes: tp 1 x pp 2" in process.stdout
    assert (tmp_path / "fp8").read_bytes() == (files / "fp8.1.1.safetensors").read_bytes()


def test_needs_processes(checkpoint: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(checkpoint), str(tmp_path / "out"), "--data", str(data), "--tp", "2"]) == 2
    expected = "tp 2 x pp 1 needs 2 processes, there is 1 process; start them so: torchrun --nproc-per-node 2 "
    assert expected in capfd.readouterr().err


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> Any:
    return open_model(Source(checkpoint=checkpoint)).resolved.config


@pytest.mark.parametrize(
    ("world_size", "asked", "own", "expected"),
    [
        (4, {}, (2, 2), (2, 2)),
        (2, {}, (1, 2), (1, 2)),
        (4, {}, (8, 1), (4, 1)),
        (4, {"pp": 2}, (4, 1), (2, 2)),
        (2, {"tp": 1}, (2, 1), (1, 2)),
        (1, {}, (2, 2), (1, 1)),
    ],
)
def test_layout(
    world_size: int, asked: dict[str, int], own: tuple[int, int], expected: tuple[int, int], config: Any
) -> None:
    sizes = {"tp": None, "pp": None} | asked
    assert choose_layout(config, "fp8", world_size, own=Layout(*own), **sizes) == Layout(*expected)


@pytest.mark.parametrize(
    ("scheme", "world_size", "asked", "change", "message"),
    [
        ("fp8", 4, {"tp": 3}, {}, "tp 3 x pp 1 needs 3 processes, there are 4"),
        ("fp8", 4, {"pp": 4}, {}, "tp 1 x pp 4 does not fit this model(?s:.*)2 layers are fewer than 4 pipeline"),
        ("fp8", 3, {}, {}, "3 processes cannot share this model(?s:.*)tp 3 x pp 1: 4 key-value heads are no mult"),
        ("int4_awq", 4, {"tp": 4}, {}, "blocks of 128 columns, a rank would hold 64 of attention's output"),
        ("fp8", 2, {"tp": 2}, {"padded_vocab_size": 251}, "251 rows of the embedding are no multiple of tp 2"),
    ],
)
def test_refused_layout(
    scheme: str, world_size: int, asked: dict[str, int], change: dict[str, int], message: str, config: Any
) -> None:
    sizes, changed = {"tp": None, "pp": None} | asked, structs.replace(config, **change)
    with pytest.raises(ExportError, match=message):
        choose_layout(changed, scheme, world_size, own=Layout(1, 1), **sizes)


def boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    """The whole, a layer's right half, and a part of every dim."""
    yield Box.whole(shape)
    yield Box((1, 0, shape[2] // 2), (1, shape[1], shape[2] // 2))
    yield Box((0, 3, 5), (2, shape[1] - 7, 11))


def test_reads_parts(checkpoint: Path) -> None:
    """As the reader that reads whole chunks."""
    from dist_export.calibrate.shards import read_box
    from dist_export.verify import records

    index = open_model(Source(checkpoint=checkpoint)).checkpoint.index
    key = "decoder.layers.mlp.linear_fc2.weight"
    with closing(SourceFiles(index)) as sources:
        for box in boxes(index.tensors[key].shape):
            assert torch.equal(read_box(sources, key, box), records.read_box(index, key, box))
    part = Box((1, 0, 128), (1, 256, 64))
    with closing(SourceFiles(index)) as sources:
        read_box(sources, key, part)
        assert part.num_elements * 4 <= sources.num_bytes_read < part.num_elements * 4 + 10_000  # and records' heads


def test_ranks_must_agree() -> None:
    from dist_export.calibrate.places import Piece, Place, decode, encode, merge, pieces_of

    def parts(second: float, row: int) -> dict[int, list[Piece]]:
        gate_and_up = Place(((0, 2), (row, 2)), 0)
        values = {"x": torch.tensor([1.0]), "rows": torch.arange(4.0)[:, None]}
        pieces = [piece for name, each in values.items() for piece in pieces_of(name, each, gate_and_up, block=None)]
        return {0: list(decode(encode(pieces))), 1: [Piece("x", (0,), torch.tensor([second]))]}

    assert merge(parts(1.0, 2))["rows"].tolist() == [[0], [1], [2], [3]]
    with pytest.raises(ExportError, match=re.escape("x: ranks 0 and 1 hold different numbers")):
        merge(parts(2.0, 2))
    with pytest.raises(ExportError, match="rows: no rank holds 2 of its 6 numbers"):
        merge(parts(1.0, 4))
