"""TransformerEngine's layer states of every release, their activation scales, and states nobody should trust."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.other_formats import pack, write_zarr
from support.quantizer_states import (
    MEGATRON_RECIPES,
    RELEASES,
    modelopt_state,
    properties,
    record,
    split_state,
    te_state,
)
from support.torch_dist import write_torch_dist

from dist_export.checkpoint.archive import open_tar
from dist_export.checkpoint.extra_state import decode_extra_state
from dist_export.checkpoint.extra_state_records import state_records
from dist_export.checkpoint.file_tree import FileTree
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.nemo_ranks import read_rank_files
from dist_export.checkpoint.open import open_checkpoint
from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.checkpoint.te_states import Activation, ExpertGroups, Problem, TeScales, read_te_scales
from dist_export.errors import ExportError

SCALE = torch.tensor([3.7, 112.5, 1.0])
HISTORY = torch.tensor([[0.0, 0.0, 0.0], [121.08, 3.98, 0.0]])
QKV = "decoder.layers.{layer}.self_attention.linear_qkv"
FC1 = "decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1"
PLACES = {
    "0.2": "0.1 to 0.2",
    "0.3": "0.3 to 0.7",
    "0.6": "0.3 to 0.7",
    "0.9": "0.8 to 1.5",
    "1.0": "0.8 to 1.5",
    "1.5": "0.8 to 1.5",
    "1.13": "1.x",
    "1.14": "1.x",
    "2.0": "2.0 to 2.1",
    "2.1": "2.0 to 2.1",
    "2.3": "2.x",
    "2.10": "2.x",
    "2.15": "2.15 or later",
}


def folder_with(path: Path, states: dict[str, Any]) -> Path:
    """A torch_dist checkpoint of one weight and these objects, saved as Megatron saves sharded objects."""
    weight = {"decoder.final_layernorm.weight": torch.ones(4)}
    return write_torch_dist(path, weight, args={}, extra_objects={name: [state] for name, state in states.items()})


def scales_in(path: Path, states: dict[str, Any], **options: Any) -> TeScales:
    return read_te_scales(open_checkpoint(folder_with(path, states)).index, **options)


def decoded(state: object) -> Any:
    return decode_extra_state(record(state), origin="record")


@pytest.mark.parametrize("release", RELEASES)
def test_every_release(release: str) -> None:
    two_per_gemm = release == "0.2"
    scale, history = (SCALE[:2], HISTORY[:, :2]) if two_per_gemm else (SCALE, HISTORY)
    found = decoded(te_state(release, scale, history))
    assert found.te.release == PLACES[release] and found.modelopt is None
    assert found.te.scale_fwd.tobytes() == scale.numpy().tobytes()
    assert found.te.amax_history_fwd.tobytes() == history.contiguous().numpy().tobytes()
    assert found.te.num_gemms == (None if two_per_gemm else 1)
    if release.startswith("2"):
        assert (found.recipe.name, found.recipe.amax_history_len, found.recipe.margin) == ("DelayedScaling", 2, 0)
    else:
        assert found.recipe is None


@pytest.mark.parametrize("module", MEGATRON_RECIPES)
def test_megatrons_recipe(module: str) -> None:
    found = decoded(te_state("2.3", SCALE, HISTORY, recipe="TEDelayedScaling", module=module))
    assert (found.recipe.name, found.te.scale_fwd.tolist()) == ("TEDelayedScaling", SCALE.tolist())


@pytest.mark.parametrize("release", RELEASES)
def test_layers_that_did_not_run_in_fp8(release: str) -> None:
    found = decoded(te_state(release, None))
    expected = {"0.2": "None", "0.3": "None", "2.10": "empty tensor", "2.15": "empty tensor"}
    assert (found.te, found.without) == (None, expected.get(release, "pickled None"))


@pytest.mark.parametrize("recipe", ["Float8CurrentScaling", "MXFP8BlockScaling", "NVFP4BlockScaling", "CustomRecipe"])
def test_recipes_that_keep_no_scales(recipe: str) -> None:
    found = decoded(te_state("2.10", None, recipe=recipe))
    assert (found.te, found.recipe.name, found.without) == (None, recipe, f"recipe {recipe}")


def test_raw_bytes_of_a_state_tensor() -> None:
    data = te_state("2.3", SCALE, HISTORY).numpy().tobytes()
    assert decode_extra_state(data, origin="rank").te.scale_fwd.tolist() == SCALE.tolist()
    assert decode_extra_state(b"", origin="rank").without == "empty tensor"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("release", ["1.13", "2.0", "2.10"])
def test_inside_of_modelopts_state(release: str, zipped: bool) -> None:
    inner = te_state(release, SCALE, HISTORY)
    found = decoded(modelopt_state({"weight_quantizer": properties((4, 3))}, te=inner, zipped=zipped))
    assert found.te.scale_fwd.tolist() == SCALE.tolist()
    assert found.modelopt["modelopt_quantizer_state"]["weight_quantizer"]["_num_bits"] == (4, 3)


def test_homogeneous_layers(tmp_path: Path) -> None:
    key = "decoder.layers.self_attention.linear_qkv._extra_state"
    states = {f"{key}/shard_{layer}_12": te_state("1.13", SCALE * (layer + 1), HISTORY) for layer in (0, 2, 10)}
    states[f"{key}/shard_11_12"] = te_state("1.13", None)
    found = scales_in(tmp_path / "c", states)
    for layer in (0, 2, 10):
        scale = found.scales[ModuleName(QKV, layer), Activation.INPUT]
        wanted = np.float32(1) / np.float32(SCALE[0].item()) if layer == 0 else 1 / (SCALE * (layer + 1)).numpy()[0]
        assert np.float32(scale.dequantise).tobytes() == np.float32(wanted).tobytes()
        assert scale.origin == f"{key}/shard_{layer}_12"
    assert found.without == {ModuleName(QKV, 11): "pickled None"}
    assert (found.faults, found.releases, len(found.scales)) == ([], {"1.x"}, 3)


def test_layers_with_numbers_and_a_wrappers_prefix(tmp_path: Path) -> None:
    states = {
        "model.decoder.layers.3.self_attention.linear_qkv._extra_state/shard_0_1": te_state("2.3", SCALE, HISTORY),
        "model.decoder.layers.3.mlp.shared_experts.linear_fc2._extra_state/shard_0_1": te_state("2.3", SCALE, HISTORY),
        "model.decoder.final_layernorm._extra_state/shard_0_1": None,
    }
    found = scales_in(tmp_path / "c", states)
    shared = ModuleName("decoder.layers.{layer}.mlp.shared_experts.linear_fc2", 3)
    assert set(found.scales) == {(ModuleName(QKV, 3), Activation.INPUT), (shared, Activation.INPUT)}


def test_layernorm_mlp_and_attention(tmp_path: Path) -> None:
    mlp, attention = torch.arange(2.0, 8.0), torch.arange(11.0, 20.0)
    states = {
        "decoder.layers.0.mlp._extra_state/shard_0_1": te_state("1.13", mlp, num_gemms=2),
        "decoder.layers.0.self_attention.core_attention._extra_state/shard_0_1": te_state("2.3", attention),
        "decoder.layers.1.self_attention.core_attention.fused_attention._extra_state/shard_0_1": te_state(
            "1.5", attention
        ),
    }
    found = {(str(name), kind): scale.scale for (name, kind), scale in scales_in(tmp_path / "c", states).scales.items()}
    assert found == {
        ("decoder.layers.0.mlp", Activation.INPUT): 2.0,
        ("decoder.layers.0.mlp", Activation.FC2_INPUT): 5.0,
        ("decoder.layers.0.self_attention.core_attention", Activation.QKV): 13.0,
        ("decoder.layers.1.self_attention.core_attention.fused_attention", Activation.QKV): 13.0,
    }


def test_layernorm_mlp_of_two_scales_per_product(tmp_path: Path) -> None:
    """TransformerEngine 0.1 and 0.2: input and weight of fc1, then of fc2."""
    state = te_state("0.2", torch.tensor([2.0, 3.0, 4.0, 5.0]), num_gemms=2)
    found = scales_in(tmp_path / "c", {"decoder.layers.0.mlp._extra_state/shard_0_1": state}).scales
    assert {kind: scale.scale for (_, kind), scale in found.items()} == {
        Activation.INPUT: 2.0,
        Activation.FC2_INPUT: 4.0,
    }


def test_zarr(tmp_path: Path) -> None:
    folder = write_zarr(tmp_path / "c", {"decoder.final_layernorm.weight": torch.ones(4)}, args=None)
    torch.save(te_state("1.13", SCALE, HISTORY), folder / "decoder.layers.mlp.linear_fc1._extra_state" / "shard_1_2.pt")
    found = read_te_scales(open_checkpoint(folder).index)
    name = "decoder.layers.{layer}.mlp.linear_fc1"
    assert list(found.scales) == [(ModuleName(name, 1), Activation.INPUT)]
    assert found.without == {ModuleName(name, 0): "None"}


def test_torch_dcp(tmp_path: Path) -> None:
    """Whole state dicts: a state in a uint8 tensor is a tensor there, the others are objects; no shard in the name."""
    key = "model.module.decoder.layers.{}.self_attention.linear_qkv._extra_state"
    tensors = {"model.module.decoder.final_layernorm.weight": torch.ones(4), key.format(0): te_state("2.3", SCALE)}
    objects = {"args": argparse.Namespace(num_layers=2), "iteration": 10, key.format(1): te_state("1.13", SCALE * 2)}
    folder = write_torch_dist(tmp_path / "c", tensors, args=None, extra_objects=objects)
    (folder / "metadata.json").unlink()
    (folder / "common.pt").unlink()
    found = read_te_scales(open_checkpoint(folder).index)
    assert {name.layer: scale.scale for (name, _), scale in found.scales.items()} == {
        layer: float((SCALE * (1 + layer))[0]) for layer in (0, 1)
    }


BROKEN = {
    Problem.NAN: float("nan"),
    Problem.ZERO: 0.0,
    Problem.INFINITE: float("inf"),
    Problem.NEGATIVE: -2.0,
}


def test_scales_that_cannot_be_used_are_all_named(tmp_path: Path) -> None:
    key = "decoder.layers.{}.mlp.linear_fc1._extra_state/shard_0_1"
    states = {
        key.format(layer): te_state("2.3", torch.tensor([value, 1.0, 1.0]), HISTORY)
        for layer, value in enumerate(BROKEN.values())
    }
    states[key.format(4)] = te_state("2.3", torch.ones(3))  # never calibrated: scale 1, history of zeros
    states[key.format(5)] = te_state("2.3", torch.ones(3), HISTORY)  # an amax of 448 was really seen
    states[key.format(6)] = te_state("2.3", torch.tensor([2.0, 2.0, 1.0]))  # Megatron's history of length 1 is zeros
    states[key.format(7)] = te_state("2.3", torch.tensor([1e-40, 2.0, 1.0]), HISTORY)  # its inverse overflows
    found = scales_in(tmp_path / "c", states)
    assert {name.layer for name, _ in found.scales} == {5, 6}
    assert [fault.module.layer for fault in found.faults] == [0, 1, 2, 3, 4, 7]
    for layer, problem in enumerate([*BROKEN, Problem.UNCALIBRATED]):
        (fault,) = (fault for fault in found.faults_of(problem) if fault.module.layer == layer)
        assert key.format(layer) in fault.message and problem.value in fault.message
    assert found.faults[-1].problem is Problem.ZERO


def test_a_state_of_another_module(tmp_path: Path) -> None:
    found = scales_in(
        tmp_path / "c",
        {"decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1": te_state("2.3", torch.arange(1.0, 10.0))},
    )
    assert [fault.problem for fault in found.faults] == [Problem.MALFORMED] and not found.scales
    assert "holds 9 scales, expected 2 or 3" in found.faults[0].message


def legacy_folder(path: Path, states: dict[str, list[Any]]) -> Path:
    """Two tp ranks of one layer; `states` has each rank's."""
    args = {"num_layers": 1, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    args |= {"add_bias_linear": False, "num_attention_heads": 2}
    for rank in range(2):
        model: dict[str, Any] = {
            "embedding.word_embeddings.weight": torch.ones(4, 4),
            "decoder.layers.0.self_attention.linear_proj.weight": torch.ones(4, 2),
            "decoder.final_layernorm.weight": torch.ones(4),
            "output_layer.weight": torch.ones(4, 4),
        }
        model |= {name: per_rank[rank] for name, per_rank in states.items()}
        folder = path / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        state = {"model": model, "args": argparse.Namespace(**args), "iteration": 10, "checkpoint_version": 3.0}
        torch.save(state, folder / "model_optim_rng.pt")
    return path


PROJ = "decoder.layers.0.self_attention.linear_proj._extra_state"


def test_legacy_ranks_that_agree(tmp_path: Path) -> None:
    both = [te_state("2.3", SCALE, HISTORY), te_state("2.3", SCALE, HISTORY)]
    found = read_te_scales(open_checkpoint(legacy_folder(tmp_path / "c", {PROJ: both})).index)
    ((name, scale),) = found.scales.items()
    assert (str(name[0]), scale.scale) == (PROJ.removesuffix("._extra_state"), np.float32(3.7))


@pytest.mark.parametrize("in_child", [False, True])
def test_legacy_states_inside_of_the_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_child: bool) -> None:
    """Two pipeline stages of a tp rank each, numbered from 0, with the BytesIO of TransformerEngine 1."""
    args = {"num_layers": 2, "pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": True}
    for stage in range(2):
        model: dict[str, Any] = {"decoder.layers.0.self_attention.linear_proj.weight": torch.full((4, 4), 1.0 + stage)}
        model |= {
            f"{ends}.word_embeddings.weight" if ends == "embedding" else f"{ends}.weight": torch.ones(4, 4)
            for ends in (["embedding"] if stage == 0 else ["output_layer"])
        }
        model |= {"decoder.final_layernorm.weight": torch.ones(4)} if stage else {}
        model[PROJ] = te_state("1.13", SCALE * (1 + stage), HISTORY)
        model["decoder.layers.0.self_attention.core_attention._extra_state"] = te_state("1.13", None)
        folder = tmp_path / "c" / f"mp_rank_00_{stage:03d}"
        folder.mkdir(parents=True)
        state = {"model": model, "args": argparse.Namespace(**args), "iteration": 10, "checkpoint_version": 3.0}
        torch.save(state, folder / "model_optim_rng.pt")
    if in_child:
        monkeypatch.setattr("dist_export.checkpoint.rank_extra_states.IN_PROCESS_BYTES", 0)
    found = read_te_scales(open_checkpoint(tmp_path / "c").index)
    name = "decoder.layers.{layer}.self_attention.linear_proj"
    assert {key: scale.scale for (key, _), scale in found.scales.items()} == {
        ModuleName(name, layer): float((SCALE * (1 + layer))[0]) for layer in range(2)
    }
    assert found.scales[ModuleName(name, 1), Activation.INPUT].origin.endswith(
        "layers.1.self_attention.linear_proj._extra_state/mp_rank_00_001"
    )
    assert len(found.without) == 2


def test_legacy_ranks_that_differ_are_both_named(tmp_path: Path) -> None:
    both = [te_state("2.3", SCALE, HISTORY), te_state("2.3", SCALE * 2, HISTORY)]
    found = read_te_scales(open_checkpoint(legacy_folder(tmp_path / "c", {PROJ: both})).index)
    (fault,) = found.faults
    assert fault.problem is Problem.DIFFERS and not found.scales
    assert f"{PROJ}/mp_rank_00" in fault.message and f"{PROJ}/mp_rank_01" in fault.message


# Experts of one grouped linear: four, two on each of two training ranks. Every number tells whose it is.

INPUTS = np.float32([10, 11, 12, 13])
WEIGHTS = np.float32([20, 21, 22, 23])


def rank_vectors(rank: int, *, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's scales [6] and history [2, 6] as TransformerEngine keeps them."""
    own = slice(2 * rank, 2 * rank + 2)
    kinds = np.stack([INPUTS[own], WEIGHTS[own], np.ones(2, np.float32)])
    scale = (kinds.T if interleaved else kinds).reshape(-1)
    return torch.from_numpy(scale.copy()), torch.from_numpy(np.stack([0 * scale, 448 / scale]))


def split_experts(release: str, *, interleaved: bool, layer: str = "0.{}_1.4") -> dict[str, Any]:
    """The records of Megatron-Core from 0.11 on."""
    key, states = "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_" + layer, {}
    for rank in range(2):
        for local, state in enumerate(split_state(release, *rank_vectors(rank, interleaved=interleaved))):
            states[key.format(2 * rank + local)] = state
    return states


def inputs_of(found: TeScales) -> dict[int, float]:
    assert not found.faults, found.faults
    return {name.expert: scale.scale for (name, _), scale in found.scales.items()}


EXPECTED = dict(enumerate(INPUTS.tolist()))


@pytest.mark.parametrize(
    ("release", "interleaved", "te_version"),
    [
        ("1.13", False, None),
        ("2.1", False, None),
        ("2.15", True, None),
        ("2.3", True, (2, 3)),
        ("2.3", False, (2, 2)),
        ("2.10", True, (2, 10)),
    ],
)
def test_split_experts_get_their_own_inputs(
    tmp_path: Path, release: str, interleaved: bool, te_version: tuple[int, int] | None
) -> None:
    states = split_experts(release, interleaved=interleaved)
    found = scales_in(tmp_path / "c", states, num_local_experts=2, te_version=te_version)
    assert inputs_of(found) == EXPECTED
    assert {name.pattern for name, _ in found.scales} == {FC1}


def test_split_experts_are_mislabelled_without_the_repair(tmp_path: Path) -> None:
    """What makes the repair necessary: the part of expert 1 begins with a weight's scale."""
    states = split_experts("2.15", interleaved=True)
    first_entries = [float(decoded(state).te.scale_fwd[0]) for state in states.values()]
    assert first_entries == [10, 20, 12, 22]


def test_a_layer_outside_of_fp8_tells_the_release(tmp_path: Path) -> None:
    states = split_experts("2.10", interleaved=True)
    states["decoder.layers.self_attention.linear_qkv._extra_state/shard_0_1"] = te_state("2.10", None)
    assert inputs_of(scales_in(tmp_path / "c", states, num_local_experts=2)) == EXPECTED


def test_unknown_release_is_refused_unless_both_readings_agree(tmp_path: Path) -> None:
    found = scales_in(tmp_path / "a", split_experts("2.10", interleaved=True), num_local_experts=2)
    (fault,) = found.faults
    assert fault.problem is Problem.AMBIGUOUS and not found.scales
    assert "the input's is 20.0 or 11.0" in fault.message or "the input's is 20.0 or 12.0" in fault.message
    same = {
        f"decoder.layers.0.mlp.experts.experts.{expert}.linear_fc1._extra_state/shard_0_1": state
        for expert, state in enumerate(split_state("2.10", torch.full((6,), 5.0), torch.ones(2, 6)))
    }
    assert inputs_of(scales_in(tmp_path / "b", same, num_local_experts=2)) == {0: 5.0, 1: 5.0}


@pytest.mark.parametrize(("release", "interleaved"), [("1.13", False), ("2.15", True)])
def test_whole_states_under_every_expert(tmp_path: Path, release: str, interleaved: bool) -> None:
    states = {}
    for expert in range(4):
        scale, history = rank_vectors(expert // 2, interleaved=interleaved)
        key = f"decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_0.{expert}_1.4"
        states[key] = te_state(release, scale, history, num_gemms=2)
    assert inputs_of(scales_in(tmp_path / "c", states)) == EXPECTED  # their length tells how many experts a rank held


def test_experts_of_their_own_linears(tmp_path: Path) -> None:
    states = {
        f"decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_0.{expert}_1.4": te_state(
            "2.10", torch.tensor([INPUTS[expert], WEIGHTS[expert], 1.0])
        )
        for expert in range(4)
    }
    assert inputs_of(scales_in(tmp_path / "a", states, num_local_experts=2)) == EXPECTED
    found = scales_in(tmp_path / "b", states, num_local_experts=2, grouped_gemm=True)
    assert [fault.problem for fault in found.faults] == [Problem.AMBIGUOUS]  # copies without their storage's rest


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("drop", {"num_local_experts": 2}, "a rank held experts 2 to 3, states are there for 2"),
        ("none", {"num_local_experts": 4}, "was saved from 2 experts per rank, .* is 4"),
        ("other", {"num_local_experts": 2}, "was cut out of other scales"),
    ],
)
def test_experts_that_do_not_belong_together(tmp_path: Path, change: str, options: Any, message: str) -> None:
    states = split_experts("2.15", interleaved=True)
    last = "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_0.3_1.4"
    if change == "drop":
        del states[last]
    if change == "other":
        states[last] = split_state("2.15", torch.arange(1.0, 7.0), torch.ones(2, 6))[1]
    found = scales_in(tmp_path / "c", states, **options)
    (fault,) = found.faults
    assert fault.problem is Problem.MALFORMED
    assert re.search(message, fault.message), fault.message


def test_experts_of_a_legacy_rank(tmp_path: Path) -> None:
    scale, history = rank_vectors(0, interleaved=True)
    key = "decoder.layers.0.mlp.experts.linear_fc1._extra_state"
    state = te_state("2.15", scale, history, num_gemms=2)
    index = open_checkpoint(legacy_folder(tmp_path / "c", {key: [state, state]})).index
    found = read_te_scales(index, num_local_experts=2)
    ((name, scale_found),) = found.scales.items()
    assert (name[0], scale_found.scale) == (ModuleName(FC1, 0, -1), 10.0)  # the largest amax of all experts


@pytest.mark.parametrize("place", ["shard_3_2", "shard_0.1_1.2", "shard_0", "shard_1_4"])
def test_places_outside_of_the_model(tmp_path: Path, place: str) -> None:
    key = "decoder.layers.5.self_attention.linear_qkv._extra_state"
    index = open_checkpoint(folder_with(tmp_path / "c", {f"{key}/{place}": None})).index
    if place == "shard_0":  # not a shard's name: taken for a rank's
        assert state_records(index)[0].rank == "shard_0"
        return
    with pytest.raises(ExportError, match=rf"cannot be placed in the model: {key}/{place}: its place"):
        state_records(index)


# States that nobody should trust.


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/dist_export_was_here",)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def rebuilt(storage: Any, *rest: Any) -> bytes:
    """A pickled state whose scale is ``_rebuild_tensor_v2(storage, *rest)``."""

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, *rest, False, {})

    return pickle.dumps({"scale_fwd": Tensor(), "amax_history_fwd": torch.zeros(1, 3)})


class Storage:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.data,)


def storage(count: int) -> Storage:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of typed storages, which pickled tensors are made of all the same
        torch.save(torch.FloatStorage([1.0] * count), buffer, _use_new_zipfile_serialization=False)
    return Storage(buffer.getvalue())


HOSTILE = {
    "code in a pickle": (pickle.dumps({"scale_fwd": Evil()}), "refused: it names posix.system"),
    "code in a storage": (rebuilt(Storage(pickle.dumps(Evil())), 0, (3,), (1,)), "no torch.save file"),
    "a list in a storage": (rebuilt(Storage(b""), 0, (3,), (1,)), "no torch.save file"),
    "an import": (b"cos\nsystem\n.", "begins with"),
    "code in a zip": (saved({"scale_fwd": Evil()}), "refused: it names posix.system"),
    "a large memo": (b"\x80\x04Nr\xff\xff\xff\x7f.", "memo index"),
    "a large length": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.", "announces"),
    "too many opcodes": (b"\x80\x04" + b"N0" * 300_000 + b"N.", "more than 400000 opcodes"),
    "repeated elements": (rebuilt(storage(3), 0, (1 << 30,), (0,)), "repeats elements"),
    "outside of its storage": (rebuilt(storage(3), 1, (3,), (1,)), "does not fit"),
    "a shape of text": (rebuilt(storage(3), 0, ("3",), (1,)), "not a tensor over one typed storage"),
    "a shape without strides": (rebuilt(storage(3), 0, (3,), ()), "has 1 sizes and 0 strides"),
    "another type": (pickle.dumps({"scale_fwd": torch.ones(3).double()}), "is of float64, expected float32"),
    "no tensor": (pickle.dumps({"scale_fwd": "1.0"}), "scale_fwd is a str, expected a tensor"),
    "no numbers": (pickle.dumps({"scale_fwd": [[1.0], 2.0]}), "scale_fwd is a list of other than numbers"),
    "no history": (pickle.dumps({"scale_fwd": torch.ones(3)}), "amax_history_fwd is a NoneType"),
    "a history of others": (
        pickle.dumps({"scale_fwd": torch.ones(3), "amax_history_fwd": torch.ones(1, 6)}),
        "do not belong together",
    ),
    "another dictionary": (pickle.dumps({"weights": 1}), "is a dictionary of weights"),
    "an object": (pickle.dumps(io.StringIO("x")), "an object of _io.StringIO"),
    "text": (b"hello", "neither a pickle nor a torch.save file"),
    "half of a zip": (saved({"scale_fwd": torch.ones(3)})[:400], "does not end as a zip"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_states(name: str) -> None:
    data, message = HOSTILE[name]
    for state in (as_tensor(data), io.BytesIO(data)):
        with pytest.raises(ExportError, match=message):
            decoded(state)
    assert not Path("/tmp/dist_export_was_here").exists()


def test_states_in_states() -> None:
    state = te_state("2.3", SCALE, HISTORY)
    for _ in range(9):
        state = as_tensor(saved(state))
    with pytest.raises(ExportError, match="nested in each other deeper"):
        decoded(state)


@pytest.mark.parametrize("release", ["0.9", "1.13", "2.3"])
def test_damaged_bytes_are_refused_or_read_as_something(release: str) -> None:
    """Cut anywhere, or one byte changed: an error of ours or a state, never another exception."""
    data = bytearray(record(te_state(release, SCALE, HISTORY)))
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(data), 150).tolist():
        with pytest.raises(ExportError, match=r"record"):
            decode_extra_state(bytes(data[:position]) or b"?", origin="record")
        changed = bytearray(data)
        changed[position] ^= 1 << int(generator.integers(8))
        try:
            decode_extra_state(bytes(changed), origin="record")
        except ExportError as error:
            assert str(error).startswith("record")


def test_all_unreadable_states_are_named(tmp_path: Path) -> None:
    states = {
        f"decoder.layers.{layer}.mlp.linear_fc1._extra_state/shard_0_1": as_tensor(b"hello") for layer in range(3)
    }
    with pytest.raises(ExportError, match=r"(?s)cannot be read: 3 faults.*layers\.0\..*layers\.1\..*layers\.2\."):
        scales_in(tmp_path / "c", states)


def test_experts_of_a_rank_by_the_arguments() -> None:
    given = {"num_experts": 8, "expert_model_parallel_size": 4, "moe_grouped_gemm": True}
    assert ExpertGroups.of_arguments(given) == ExpertGroups(grouped_gemm=True, num_local_experts=2)
    assert ExpertGroups.of_arguments({"num_moe_experts": 8}) == ExpertGroups(num_local_experts=8)
    for unknown in (None, {}, {"num_experts": None}, {"num_experts": 7, "expert_model_parallel_size": 2}):
        assert ExpertGroups.of_arguments(unknown) == ExpertGroups()


@pytest.mark.parametrize("release", ["1.13", "2.3"])
def test_state_dict_files_of_nemo(tmp_path: Path, release: str) -> None:
    """NeMo 1: the file is the state dict; the table of its weights has no states."""
    nemo_rank_files(tmp_path, release)
    assert_nemo_scale(read_rank_files(FileTree.of_folder(tmp_path), NEMO_RANKS))


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
@pytest.mark.parametrize("in_child", [False, True])
@pytest.mark.parametrize("release", ["1.13", "2.3"])
def test_state_dict_files_in_an_archive_of_nemo(
    tmp_path: Path, release: str, mode: str, in_child: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offsets of states and of weights are those in the archive, or in what is decompressed of it."""
    nemo_rank_files(tmp_path / "folder", release)
    archive = pack(tmp_path / "folder", tmp_path / "model.nemo", mode=mode)
    if in_child:
        monkeypatch.setattr("dist_export.checkpoint.rank_extra_states.IN_PROCESS_BYTES", 0)
    assert_nemo_scale(read_rank_files(open_tar(archive), NEMO_RANKS))


NEMO_RANKS = {"num_layers": 1, "tensor_model_parallel_size": 2}


def nemo_rank_files(folder: Path, release: str) -> None:
    weight = "model.decoder.layers.0.self_attention.linear_proj.weight"
    for rank in range(2):
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
        model = {weight: torch.ones(4, 2), f"model.{PROJ}": te_state(release, SCALE, HISTORY)}
        torch.save(model, folder / f"mp_rank_{rank:02d}" / "model_weights.ckpt")


def assert_nemo_scale(index: CheckpointIndex) -> None:
    ((name, scale),) = read_te_scales(index).scales.items()
    assert (str(name[0]), scale.scale) == (PROJ.removesuffix("._extra_state"), np.float32(3.7))
    assert scale.origin == f"{PROJ}/mp_rank_00"


@pytest.mark.parametrize("release", ["0.2", "0.3"])
def test_legacy_states_that_are_plain_lists_and_dicts(tmp_path: Path, release: str) -> None:
    """TransformerEngine 0.1 to 0.5, whose state dict holds the tensors themselves."""
    scale, history = (SCALE[:2], HISTORY[:, :2]) if release == "0.2" else (SCALE, HISTORY)
    per_rank = [te_state(release, scale, history.T.contiguous().T) for _ in range(2)]
    folder = legacy_folder(tmp_path / "c", {PROJ: per_rank})
    ((name, found),) = read_te_scales(open_checkpoint(folder).index).scales.items()
    assert (str(name[0]), found.scale) == (PROJ.removesuffix("._extra_state"), np.float32(3.7))
    differing = [te_state(release, scale * (1 + rank), history) for rank in range(2)]
    (fault,) = read_te_scales(open_checkpoint(legacy_folder(tmp_path / "d", {PROJ: differing})).index).faults
    assert fault.problem is Problem.DIFFERS
