"""``--master-weights``: fp32 weights out of the optimizer's state, of real checkpoints and made ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapters import read_torch_dist
from support.exports import export, run_command
from support.small_models import LLAMA, small_model
from support.torch_dist import read_metadata, write_torch_dist

from dist_export.checkpoint import master_weights
from dist_export.checkpoint.open import find_iteration, open_checkpoint
from dist_export.errors import ExportError

PREFIX = "optimizer.state.fp32_param."


@pytest.fixture(scope="module")
def trained(megatron_checkpoint: Callable[..., Path]) -> Path:
    """The iteration folder of a real model with its optimizer."""
    return find_iteration(megatron_checkpoint(tp=2, pp=1, per_layer=True, optimizer=True, vocab=257))


def masters_of(folder: Path) -> dict[str, torch.Tensor]:
    found = read_torch_dist(folder, prefix=PREFIX)
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizers_weights_are_exported_and_the_models_own_are_not_read(
    dtype: str, trained: Path, tmp_path: Path
) -> None:
    masters, weights = masters_of(trained), read_torch_dist(trained)
    assert masters.keys() == weights.keys()
    assert any(not torch.equal(masters[name].bfloat16(), weights[name]) for name in masters)
    plain = write_torch_dist(tmp_path / "plain", masters, args=None)
    shutil.copy(trained / "common.pt", plain / "common.pt")
    blanked = without_the_models_bytes(trained, tmp_path / "iter_0000010")
    found = export(blanked, tmp_path / "found", "--master-weights", "--dtype", dtype, "--tp", 2)
    wanted = export(plain, tmp_path / "wanted", "--dtype", dtype, "--tp", 2)
    assert files_of(found) == files_of(wanted)
    report = run_command("verify", blanked, found)
    assert report.returncode == 0, report.stdout + report.stderr
    manifest = json.loads((found / "export_manifest.json").read_text())
    assert manifest["request"]["master_weights"] is True
    steps = [tensor.get("steps") for file in manifest["files"].values() for tensor in file["tensors"].values()]
    assert any(steps) == (dtype == "bfloat16")


def without_the_models_bytes(folder: Path, copy: Path) -> Path:
    """A copy with zeros in place of every record of the model's own weights."""
    shutil.copytree(folder, copy)
    for index, place in read_metadata(folder).storage_data.items():
        if not index.fqn.startswith("optimizer.") and index.offset is not None:
            with (copy / place.relative_path).open("r+b") as file:
                file.seek(place.offset)
                file.write(bytes(place.length))
    return copy


def test_a_process_of_its_own_reads_large_metadata(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = open_checkpoint(trained, master_weights=True).index
    monkeypatch.setattr(master_weights, "IN_PROCESS_BYTES", 0)
    there = open_checkpoint(trained, master_weights=True).index
    assert there.to_bytes() == here.to_bytes()
    assert {info.dtype for info in there.tensors.values()} == {"float32"}
    replaced = next(what for reason, what in there.ignored.items() if reason.startswith("the model's own weights"))
    assert replaced.num_tensors == len(there.tensors)
    assert replaced.num_bytes == sum(t.nbytes for t in read_torch_dist(trained).values())


def checkpoint_with(folder: Path, state: dict[str, torch.Tensor], *, fp32: tuple[str, ...] = ()) -> Path:
    """A small model with more tensors beside it; those of `fp32` are fp32 in the model."""
    model = small_model(LLAMA)
    tensors = {name: t.float() if name.endswith(fp32) and fp32 else t for name, t in model.tensors.items()}
    return write_torch_dist(folder, {**tensors, **state}, args=model.args)


def masters(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor | None] = {name: t.float() + 1 for name, t in small_model(LLAMA).tensors.items()}
    found |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {f"{PREFIX}{name}": tensor for name, tensor in found.items() if tensor is not None}


def test_weights_that_are_fp32_in_the_model_and_chained_optimizers(tmp_path: Path) -> None:
    state = masters(decoder__final_layernorm__weight=None)
    state = {f"chained_{number % 2}.{name}": tensor for number, (name, tensor) in enumerate(state.items())}
    folder = checkpoint_with(tmp_path / "a", state, fp32=("final_layernorm.weight",))
    plain = {**small_model(LLAMA).tensors, **{name.split(".fp32_param.")[1]: t for name, t in state.items()}}
    wanted = write_torch_dist(tmp_path / "b", {n: t.float() for n, t in plain.items()}, args=small_model(LLAMA).args)
    found = export(folder, tmp_path / "found", "--master-weights", "--dtype", "float32")
    assert files_of(found) == files_of(export(wanted, tmp_path / "wanted", "--dtype", "float32"))


NORM = "decoder.final_layernorm.weight"
FAULTS = {
    "no optimizer": ({}, r"the checkpoint has no optimizer state; export without --master-weights"),
    "moments only": (
        {f"optimizer.state.exp_avg.{NORM}": torch.zeros(32)}, r"no fp32 weights, only others, such as .*exp_avg",
    ),
    "buckets": (
        {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16).bucket_idx_0.param": torch.zeros(64)},
        r"flattened buckets without names, such as optimizer.distributed.dp_group_idx_0",
    ),
    "one is missing": (masters(output_layer__weight=None), r"output_layer.weight: the optimizer has no fp32 copy"),
    "flattened": (
        masters(output_layer__weight=torch.zeros(1, 64 * 32)),
        r"output_layer.weight: saved flattened, as \[1, 2048\]; the model's tensor is \[64, 32\]",
    ),
    "of another type": (
        masters(output_layer__weight=torch.zeros(64, 32, dtype=torch.float16)), r"is float16, expected float32",
    ),
    "unknown": (masters(other__weight=torch.zeros(4)), r"fp32_param.other.weight: the model has no other.weight"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_with_the_reason(fault: str, tmp_path: Path) -> None:
    state, message = FAULTS[fault]
    folder = checkpoint_with(tmp_path / "a", state)
    process = run_command("plan", folder, "--master-weights")
    assert process.returncode == 2
    assert re.search(message, process.stderr), process.stderr


def test_other_formats_are_refused() -> None:
    legacy = Path(__file__).parents[1] / "conformance" / "checkpoints" / "llama_legacy_core_0_16_pp2vpp2"
    with pytest.raises(ExportError, match=r"--master-weights: legacy checkpoints .* only torch_dist can have them"):
        open_checkpoint(legacy, master_weights=True)
