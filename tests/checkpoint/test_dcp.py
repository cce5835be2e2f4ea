"""torch_dcp and fsdp_dtensor checkpoints, saved by torch.distributed.checkpoint itself, against torch_dist."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from support.other_formats import exported
from support.small_models import LLAMA, SmallModel, small_model
from support.torch_dist import write_torch_dist

from dist_export.checkpoint.dcp import torch_dist_name
from dist_export.checkpoint.open import open_checkpoint
from dist_export.errors import ExportError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
from torch.distributed import checkpoint as dcp  # noqa: E402

SPEC_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def write_dcp(folder: Path, model: SmallModel, *, split: bool, local_spec: bool = False, more: Any = None) -> Path:
    """The state dict of `save_checkpoint` with --ckpt-format torch_dcp (megatron/training/checkpointing.py); `split`
    divides gate and up as fsdp_dtensor does (megatron/core/transformer/fsdp_dtensor_checkpoint.py)."""
    weights: dict[str, Any] = {}
    for name, tensor in (model.per_layer() | (more or {})).items():
        if local_spec:
            for dist_name, spec_name in SPEC_NAMES.items():
                name = name.replace(dist_name, spec_name)
        if split and name.endswith("linear_fc1.weight"):
            weights[name + "_w"], weights[name + "_v"] = (half.clone() for half in tensor.chunk(2))
        else:
            weights[name] = tensor
    weights["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(0, dtype=torch.uint8)
    state = {
        "model": {f"module.{name}": tensor for name, tensor in weights.items()},
        "optimizer": {"state": {"module.embedding.word_embeddings.weight": {"exp_avg": torch.zeros(64, 32)}}},
        "args": argparse.Namespace(**model.args),
        "iteration": 10,
        "checkpoint_version": 3.0,
        "rng_state": [{"random_rng_state": (1, 2), "np_rng_state": None}],
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize(("split", "local_spec"), [(False, False), (True, False), (True, True)])
def test_same_export_as_torch_dist(tmp_path: Path, split: bool, local_spec: bool) -> None:
    model = small_model(LLAMA)
    plain = exported(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args), tmp_path / "a", "--tp", 2)
    folder = write_dcp(tmp_path / "dcp", model, split=split, local_spec=local_spec)
    (folder / ".metadata.tmp").touch()
    assert exported(folder, tmp_path / "b", "--tp", 2) == plain


def test_permuted_tensors(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    name = "decoder.layers.self_attention.linear_proj.weight"
    plain = exported(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args), tmp_path / "a")
    model.tensors[name] = model.tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert exported(write_dcp(tmp_path / "dcp", model, split=False), tmp_path / "b") == plain


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    checkpoint = open_checkpoint(write_dcp(tmp_path / "dcp", model, split=False))
    assert (checkpoint.index.format, checkpoint.iteration, checkpoint.arguments) == ("torch_dcp", 10, model.args)
    assert checkpoint.index.ignored["optimizer state"].num_tensors == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("local_experts.3.linear_fc1.weight", "experts.3.linear_fc1.weight"),
        ("local_experts.3.linear_fc1.weight_w", "experts.3.linear_fc1.weight_w"),
        ("linear_fc1.weight12", "experts.12.linear_fc1.weight"),
        ("linear_fc1.weight12_v", "experts.12.linear_fc1.weight_v"),
        ("linear_fc2.bias0", "experts.0.linear_fc2.bias"),
    ],
)
def test_names_of_experts(name: str, expected: str) -> None:
    start = "decoder.layers.7.mlp.experts."
    assert torch_dist_name(start + name) == start + expected


@pytest.mark.parametrize("name", ["decoder.layers.1.mlp.linear_fc1.weight", "mtp.layers.0.enorm.weight"])
def test_other_names_stay(name: str) -> None:
    assert torch_dist_name(name) == name


def test_pipeline_stages_overwrote_one_another(tmp_path: Path) -> None:
    model = small_model(LLAMA, pipeline_model_parallel_size=2)
    with pytest.raises(ExportError, match=r"pipeline_model_parallel_size 2: every stage numbers its layers from 0"):
        open_checkpoint(write_dcp(tmp_path / "dcp", model, split=True))


def test_experts_that_overwrote_one_another(tmp_path: Path) -> None:
    model = small_model(LLAMA, num_experts=4)
    experts = {f"decoder.layers.0.mlp.experts.linear_fc1.weight{e}": torch.zeros(4, 4) for e in range(2)}
    with pytest.raises(ExportError, match=r"holds 2 of 4 experts: before Megatron-Core 0.16"):
        open_checkpoint(write_dcp(tmp_path / "dcp", model, split=False, more=experts))
    grouped = {"decoder.layers.0.mlp.experts.weight1": torch.zeros(4, 4)}
    with pytest.raises(ExportError, match=r"transposed blocks, .*--ckpt-format torch_dist"):
        open_checkpoint(write_dcp(tmp_path / "grouped", model, split=False, more=grouped))


def test_an_unfinished_torch_dist_checkpoint(tmp_path: Path) -> None:
    folder = write_torch_dist(tmp_path / "c", small_model(LLAMA).tensors, args={}, common="record")
    (folder / "metadata.json").unlink()
    with pytest.raises(ExportError, match=r"Megatron writes last: the save did not finish"):
        open_checkpoint(folder)


def test_a_missing_file(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", small_model(LLAMA), split=False)
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(ExportError, match=r"distcp.*No such file"):
        open_checkpoint(folder)
