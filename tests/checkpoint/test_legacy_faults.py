"""Damaged, hostile and incomplete legacy checkpoints: one error that names the file and what to do."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from support.exports import run_command  # noqa: E402
from support.legacy import rank_files, save_again  # noqa: E402

from dist_export.checkpoint.legacy import read_index  # noqa: E402
from dist_export.checkpoint.legacy_files import read_rank_state  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402

LLAMA = Path(__file__).parents[1] / "conformance" / "checkpoints" / "llama_legacy_core_0_16_pp2vpp2"
GPT = LLAMA.with_name("gpt2_legacy_core_0_16_tp2")
ITERATION = "iter_0000010"


def changed(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any], **how: Any) -> Path:
    return save_again(source, folder / "save", change, **how) / ITERATION


def test_each_length_of_a_cut_file_is_noticed(tmp_path: Path) -> None:
    for zipped in (True, False):
        folder = changed(
            LLAMA, tmp_path / str(zipped), lambda state: None, _use_new_zipfile_serialization=zipped
        )
        path = next(rank_files(folder))
        whole = path.read_bytes()
        for size in (0, 3, 200, 20_000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ExportError, match=r"mp_rank_00_000/model_optim_rng\.pt"):
                read_index(folder)
        path.write_bytes(whole + b"\0")
        with pytest.raises(ExportError, match=r"more was written after it|follow the last storage"):
            read_index(folder)


class Hostile:
    """Makes a file when unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["args", "model", "optimizer"])
def test_hostile_pickles_are_refused_by_name(tmp_path: Path, zipped: bool, where: str) -> None:
    folder = shutil.copytree(LLAMA, tmp_path / "save") / ITERATION
    path = next(rank_files(folder))
    state, mark = torch.load(path, weights_only=False), tmp_path / "was_here"
    if where == "model":
        state["model0"]["decoder.layers.0.input_layernorm.weight"] = Hostile(mark)
    else:
        state[where] = Hostile(mark)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ExportError, match=r"mp_rank_00_000/model_optim_rng\.pt: .*refused: it names posix\.system"):
        read_index(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "was not written by torch.save"),
        (pickle.dumps({"model": {}}), "was not written by torch.save"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "is a tar, which torch wrote before 0.1.10; load it"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    folder = shutil.copytree(LLAMA, tmp_path / "save") / ITERATION
    next(rank_files(folder)).write_bytes(content)
    with pytest.raises(ExportError, match=message):
        read_index(folder)


@pytest.mark.parametrize(
    ("source", "missing", "message"),
    [
        (LLAMA, "mp_rank_00_001", "mp_rank_00_001 is missing: the weights of tp rank 0, pp rank 1 are in no folder"),
        (GPT, "mp_rank_01", "mp_rank_01 is missing: the weights of tp rank 1 are in no folder; copy it from where"),
        (GPT, "mp_rank_01/model_optim_rng.pt", "mp_rank_01 holds no model_optim_rng.pt or model_rng.pt; copy it again"),
    ],
)
def test_missing_ranks(tmp_path: Path, source: Path, missing: str, message: str) -> None:
    folder = shutil.copytree(source, tmp_path / "save") / ITERATION
    path = folder / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(ExportError, match=message):
        read_index(folder)


def test_ranks_of_another_save(tmp_path: Path) -> None:
    folder = shutil.copytree(GPT, tmp_path / "save") / ITERATION
    shutil.copytree(folder / "mp_rank_01", folder / "mp_rank_02")
    with pytest.raises(ExportError, match="mp_rank_02 is beyond that layout; is it of another save"):
        read_index(folder)
    shutil.move(folder / "mp_rank_02", folder / "mp_rank_00_001")
    with pytest.raises(ExportError, match="folders of different layouts are mixed"):
        read_index(folder)


def only_rank(number: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """`change` for the file with this number alone."""
    seen = iter(range(100))

    def one(state: dict[str, Any]) -> None:
        if next(seen) == number:
            change(state)

    return one


def drop_layer(state: dict[str, Any]) -> None:
    state["model1"] = {name: value for name, value in state["model1"].items() if ".layers." not in name}


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (GPT, only_rank(1, lambda s: s.update(iteration=20)), "mp_rank_01/.* is of iteration 20, mp_rank_00 of 10"),
        (
            GPT,
            only_rank(1, lambda s: s["model"].pop("decoder.layers.2.mlp.linear_fc1.bias")),
            r"mp_rank_01/model_optim_rng.pt: lacks decoder.layers.2.mlp.linear_fc1.bias \(1\), which mp_rank_00 has",
        ),
        (
            GPT,
            only_rank(1, lambda s: s["model"].update({"decoder.final_layernorm.bias": torch.zeros(32)})),
            "final_layernorm.bias: tp ranks have different shards",
        ),
        (
            GPT,
            lambda s: s["model"].update({"decoder.layers.0.lora.weight": torch.zeros(4, 4)}),
            "lora.weight: how tp ranks share this tensor is not known, so its shards cannot be joined",
        ),
        (
            GPT,
            lambda s: s["model"].update({"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(30, 64)}),
            "linear_fc1.weight has 30 rows on a rank, expected 64 or 128 for its linear_fc2",
        ),
        (
            GPT,
            lambda s: s["model"].update({"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(())}),
            r"linear_fc1.weight: has shape \[\], expected 1 dims or more",
        ),
        (
            GPT,
            lambda s: s["model"].update({"decoder.layers.0.self_attention.linear_proj.weight": torch.zeros(8)}),
            r"linear_proj.weight: has shape \[8\], expected 2 dims or more",
        ),
        (LLAMA, only_rank(1, drop_layer), "hold 1, 1, 1, 0 layers, 3 together; num_layers is 4"),
        (LLAMA, only_rank(1, lambda s: s.pop("model1")), "has 1 virtual pipeline stages, mp_rank_00_000 has 2"),
        (LLAMA, lambda s: s.update(other=s.pop("model0")), "expected the weights under model, or model0, model1, …"),
        (LLAMA, lambda s: s["model0"].update(x=[1]), r"mp_rank_00_000/.*not plain weights: x is a list, expected a"),
        (
            LLAMA,
            lambda s: setattr(s["args"], "pipeline_model_parallel_size", 1),
            r"mp_rank_00_000 has one number after the tp rank, but .*_parallel_size 1\) mean none",
        ),
        (
            LLAMA,
            lambda s: setattr(s["args"], "expert_model_parallel_size", 2),
            "has one number after the tp rank, but .* mean two numbers after the tp rank",
        ),
        (LLAMA, lambda s: [1, 2], "holds a list, expected the dictionary that Megatron saves"),
        (
            LLAMA,
            lambda s: s["model0"].update({"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(1).expand(64, 128)}),
            "neither its rows nor its columns are contiguous; save it again",
        ),
    ],
)
def test_shards_that_do_not_fit(tmp_path: Path, source: Path, change: Any, message: str) -> None:
    folder = changed(source, tmp_path, change)
    with pytest.raises(ExportError, match=message):
        read_index(folder)


def test_a_tensor_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    def add(state: dict[str, Any]) -> None:
        state["model0"]["decoder.layers.0.surplus.weight"] = torch.zeros(4)

    folder = changed(LLAMA, tmp_path, add)
    process = run_command("plan", folder, "--tp", 1)
    assert process.returncode != 0
    assert "unexpected tensor decoder.layers.{layer}.surplus.weight" in process.stderr
    assert "Traceback" not in process.stderr


def test_storage_counts_that_contradict_the_pickle(tmp_path: Path) -> None:
    folder = changed(GPT, tmp_path, lambda state: None, _use_new_zipfile_serialization=False)
    path = next(rank_files(folder))
    data = bytearray(path.read_bytes())
    first = data.index((128 * 64).to_bytes(8, "little"))
    data[first : first + 8] = (128 * 64 - 1).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ExportError, match=r"mp_rank_00/.*has 8191 elements, 8192 are declared; the file is damaged"):
        read_index(folder)


def test_flipped_bytes_give_an_error_or_a_table(tmp_path: Path) -> None:
    folder = changed(LLAMA, tmp_path, lambda state: None, _use_new_zipfile_serialization=False)
    path = next(rank_files(folder))
    whole = path.read_bytes()
    end = len(whole) - 160_000  # pickles, without checksums, come before about 170 kB of weights
    random, refused = Random(0), 0
    for _ in range(300):
        position = random.randrange(end)
        path.write_bytes(whole[:position] + bytes([random.randrange(256)]) + whole[position + 1 :])
        try:
            read_rank_state(path, 0)
        except ExportError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 30
