"""torch_dcp and fsdp_dtensor checkpoints, saved by torch.distributed.checkpoint itself, against torch_dist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.every_format import write_dcp
from support.exports import run_command
from support.megatron_checkpoints import per_layer_weights
from support.other_formats import exported
from support.small_models import LLAMA, SmallModel, small_model
from support.torch_dist import write_torch_dist

from dist_export.checkpoint.dcp import torch_dist_name
from dist_export.checkpoint.open import open_checkpoint
from dist_export.errors import ExportError

torch = pytest.importorskip("torch")
CHECKPOINTS = Path(__file__).parents[1] / "conformance" / "checkpoints"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

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


def sequential(layer: str, expert: int, rest: str) -> str:
    return f"{layer}.mlp.experts.local_experts.{expert}.{rest}"


def grouped_by_te(layer: str, expert: int, rest: str) -> str:
    return f"{layer}.mlp.experts.{rest}{expert}"


@pytest.fixture(scope="module")
def mixtral() -> SmallModel:
    """A real Megatron-Core model with 4 experts, a key per layer, as torch_dist has it."""
    folder = CHECKPOINTS / "mixtral_core_0_16_pp2ep2" / "iter_0000010"
    arguments = dict(open_checkpoint(folder).arguments or {})
    arguments |= {"pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1}
    return SmallModel(
        {name: value for name, value in arguments.items() if isinstance(value, str | int | float | bool)},
        per_layer_weights(folder),
    )


def with_experts(model: SmallModel, naming: Any) -> SmallModel:
    """The same with module names of experts: SequentialMLP's or TEGroupedMLP's."""
    tensors = {}
    for name, tensor in model.tensors.items():
        match = re.fullmatch(r"(decoder\.layers\.\d+)\.mlp\.experts\.experts\.(.*)", name)
        if match:
            tensors |= {naming(match[1], e, match[2]): part.clone() for e, part in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return SmallModel(model.args, tensors)


@pytest.fixture(scope="module")
def exported_mixtral(mixtral: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mixtral")
    plain = write_torch_dist(folder / "plain", mixtral.tensors, args=mixtral.args)
    return exported(plain, folder / "out", "--tp", 2)


@pytest.mark.parametrize("split", [True, False], ids=["fsdp_dtensor", "torch_dcp"])
@pytest.mark.parametrize("naming", [sequential, grouped_by_te])
def test_experts(
    mixtral: SmallModel, exported_mixtral: dict[str, Any], naming: Any, split: bool, tmp_path: Path
) -> None:
    """`split`: as Megatron-FSDP writes them with any expert parallelism, every number global
    (megatron/core/transformer/fsdp_dtensor_checkpoint.py, `handle_experts_in_state_dict`)."""
    folder = write_dcp(tmp_path / "dcp", with_experts(mixtral, naming), split=split, local_spec=True)
    assert exported(folder, tmp_path / "out", "--tp", 2) == exported_mixtral


@pytest.mark.parametrize("naming", [sequential, grouped_by_te])
def test_experts_that_overwrote_one_another(mixtral: SmallModel, naming: Any, tmp_path: Path) -> None:
    model = with_experts(mixtral, naming)
    lost = {naming(f"decoder.layers.{layer}", e, "linear_fc2.weight") for layer in range(4) for e in (2, 3)}
    model.tensors = {name: tensor for name, tensor in model.tensors.items() if name not in lost}
    message = r"experts\.experts\.\{expert\}\.linear_fc2\.weight of 2 of 4 experts: .*--ckpt-format torch_dist"
    with pytest.raises(ExportError, match=message):
        open_checkpoint(write_dcp(tmp_path / "dcp", model, split=True))


@pytest.mark.parametrize("name", ["weight1", "weight2", "linear_fc1.weight"])
def test_experts_in_one_tensor(mixtral: SmallModel, name: str, tmp_path: Path) -> None:
    """GroupedMLP (until 0.16) and --moe-single-grouped-weight."""
    tensors = {key: tensor for key, tensor in mixtral.tensors.items() if ".experts." not in key}
    more = {f"decoder.layers.{layer}.mlp.experts.{name}": torch.zeros(4, 4, 4) for layer in range(4)}
    folder = write_dcp(tmp_path / "dcp", SmallModel(mixtral.args, tensors), split=False, more=more)
    done = run_command("inspect", folder)
    assert done.returncode == 2
    assert f"decoder.layers.0.mlp.experts.{name} holds all experts of a rank as one tensor" in done.stderr
    assert "save it in the torch_dist format (--ckpt-format torch_dist)" in done.stderr


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
