"""What is asked of the source comes from the manifest: a base model, a calibration, overrides, a family, a mapping."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from support.adapters import lora, read_torch_dist, write_bridge_adapters  # noqa: E402
from support.quantizable import llama  # noqa: E402
from support.refits import NEW, OLD, assert_same_export, export, run, save_both  # noqa: E402
from support.small_models import LLAMA, small_model  # noqa: E402

REAL = Path(__file__).parents[1] / "conformance" / "checkpoints" / "llama_core_0_16_tp2pp2"


def test_adapters_that_were_trained_on(tmp_path: Path) -> None:
    """Merged into the base model of the export, which may have moved."""
    adapters = lora(read_torch_dist(REAL / "iter_0000010"))
    old = write_bridge_adapters(tmp_path / "old", adapters)
    new = write_bridge_adapters(tmp_path / "new", {name: tensor * 1.5 for name, tensor in adapters.items()})
    moved = Path(shutil.copytree(REAL, tmp_path / "moved"))
    output, fresh = tmp_path / "out", tmp_path / "fresh"
    assert run("export", old, output, "--base", REAL, "--tp", 2) == 0
    assert run("export", new, fresh, "--base", moved, "--tp", 2) == 0
    assert run("refit", new, output, "--base", moved) == 0
    assert_same_export(output, fresh)
    assert run("verify", new, output) == 0


def test_a_new_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only scales change."""
    checkpoint = llama().write(tmp_path / "c")
    names = [f"decoder.layers.{n}.self_attention.core_attention.{p}_bmm_quantizer._amax" for n in (0, 1) for p in "kv"]
    for file, value in (("old", 900.0), ("new", 1800.0)):
        save_file({name: torch.tensor(value) for name in names}, tmp_path / f"{file}.safetensors")
    output, fresh = tmp_path / "out", tmp_path / "fresh"
    cache = ("--kv-cache", "fp8")
    assert run("export", checkpoint, output, *cache, "--calibration", tmp_path / "old.safetensors") == 0
    assert run("export", checkpoint, fresh, *cache, "--calibration", tmp_path / "new.safetensors") == 0
    before = {n: t.clone() for n, t in load_file(output / "rank0.safetensors").items()}  # it maps the file
    assert run("refit", checkpoint, output, "--calibration", tmp_path / "new.safetensors") == 0
    assert_same_export(output, fresh)
    after = load_file(output / "rank0.safetensors")
    changed = {name for name in after if after[name].float().ne(before[name].float()).any()}
    assert changed and all("cache_scaling_factor" in name for name in changed)
    # The recorded file is of the old weights: it is read again only where that is said.
    capsys.readouterr()
    assert run("refit", checkpoint, output) == 2
    error = capsys.readouterr().err
    assert f"was exported with --calibration {tmp_path / 'new.safetensors'}" in error
    assert "give --calibration FILE with those of the new iteration" in error
    assert run("refit", checkpoint, output, "--calibration", tmp_path / "new.safetensors") == 0
    assert_same_export(output, fresh)


def test_overrides_and_where_they_came_from(tmp_path: Path) -> None:
    model = small_model(LLAMA, padded_vocab_size=64)
    save = save_both(tmp_path / "save", model, lambda tensors: [each.mul_(2) for each in tensors.values()])
    asked = ("--vocab-size", 61, "--set", "norm_epsilon=1e-6", "--family", "llama", "--tp", 2)
    output, fresh = export(save, tmp_path / "out", OLD, *asked), export(save, tmp_path / "fresh", NEW, *asked)
    assert run("refit", save, output, "--iteration", NEW) == 0
    assert_same_export(output, fresh)
    model_said = json.loads((output / "export_manifest.json").read_text())["model"]
    assert model_said["vocab_size"] == {"value": 61, "from": "command line"}


def test_a_mapping_of_ones_own(tmp_path: Path) -> None:
    """Its rules are in the manifest."""
    model, old_name = small_model(LLAMA), "decoder.layers.mlp.linear_fc2.weight"
    model.tensors["decoder.layers.mlp.our_down.weight"] = model.tensors.pop(old_name)
    save = save_both(tmp_path / "save", model, lambda tensors: [each.mul_(2) for each in tensors.values()])
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        "family: llama\nname: ours\nsource:\n"
        "  - source: decoder.layers.{layer}.mlp.our_down.weight\n    logical: layers.{layer}.mlp.down.weight\n"
    )
    asked = ("--mapping", mapping, "--target", "hf")
    output, fresh = export(save, tmp_path / "out", OLD, *asked), export(save, tmp_path / "fresh", NEW, *asked)
    mapping.unlink()
    assert run("refit", save, output, "--iteration", NEW) == 0
    assert_same_export(output, fresh)
