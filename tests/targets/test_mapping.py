"""A model of one's own: rules from a YAML file, in place of or beside a family's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.exports import run_command
from support.small_models import LLAMA, SmallModel, small_model
from support.torch_dist import write_torch_dist


def run(*arguments: object, code: int = 0) -> str:
    """The command's standard error; the test fails when it ends with another code."""
    result = run_command(*arguments)
    assert result.returncode == code, result.stderr
    return str(result.stderr)


OWN = """\
family: llama
name: house model
source:
  - source: decoder.layers.{layer}.mlp.our_down.weight
    logical: layers.{layer}.mlp.down.weight
  - source: decoder.layers.{layer}.mlp.our_gate.weight
    logical: layers.{layer}.our.gate.weight
trtllm:
  rules:
    - target: transformer.layers.{layer}.our_gate.weight
      inputs: [{logical: "layers.{layer}.our.gate.weight", shard: column}]
  config: {our_field: 3}
hf:
  architecture: HouseForCausalLM
  remove: [model.norm.weight]
  rules:
    - target: model.final.weight
      scope: last
      values: subtract_one
      inputs: [final_norm.weight]
    - target: model.layers.{layer}.our_gate.weight
      inputs: ["layers.{layer}.our.gate.weight"]
      transposed: true
  config: {model_type: house}
"""


@pytest.fixture
def house(tmp_path: Path) -> tuple[SmallModel, Path]:
    """A Llama whose linear_fc2 has another name, with one more weight per layer."""
    model = small_model(LLAMA)
    name = "decoder.layers.mlp.linear_fc2.weight"
    tensors = dict(model.tensors)
    tensors["decoder.layers.mlp.our_down.weight"] = tensors.pop(name)
    layers = model.args["num_layers"]
    tensors["decoder.layers.mlp.our_gate.weight"] = torch.randn(layers, 8, 6).bfloat16()
    folder = tmp_path / "checkpoint" / "iter_0000001"
    write_torch_dist(folder, tensors, args=model.args)
    (tmp_path / "own.yaml").write_text(OWN)
    return SmallModel(model.args, tensors), folder


def test_rules_of_a_file_are_exported_and_verified(house: tuple[SmallModel, Path], tmp_path: Path) -> None:
    model, folder = house
    output = tmp_path / "out"
    mapping = ["--mapping", str(tmp_path / "own.yaml")]
    targets = ["--target", "trtllm", "--target", "hf", "--tp", "2"]
    run("export", str(folder), str(output), *targets, *mapping)
    whole = load_file(output / "hf" / "model.safetensors")
    norm = model.tensors["decoder.final_layernorm.weight"]
    assert "model.norm.weight" not in whole
    assert torch.equal(whole["model.final.weight"], (norm - 1).bfloat16())
    gate = model.tensors["decoder.layers.mlp.our_gate.weight"]
    assert torch.equal(whole["model.layers.1.our_gate.weight"], gate[1].T)
    config = json.loads((output / "hf" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["HouseForCausalLM"], "house")
    for rank in range(2):
        shard = load_file(output / "trtllm" / f"rank{rank}.safetensors")
        assert torch.equal(shard["transformer.layers.0.our_gate.weight"], gate[0, rank * 4 : rank * 4 + 4])
        down = model.tensors["decoder.layers.mlp.our_down.weight"][1]
        half = down.shape[1] // 2
        assert torch.equal(shard["transformer.layers.1.mlp.proj.weight"], down[:, rank * half : (rank + 1) * half])
    assert json.loads((output / "trtllm" / "config.json").read_text())["our_field"] == 3
    (tmp_path / "own.yaml").unlink()  # the manifest has the rules
    run("verify", str(folder), str(output))


def test_without_the_file_its_tensors_are_unexpected(house: tuple[SmallModel, Path], tmp_path: Path) -> None:
    _, folder = house
    result = run("export", str(folder), str(tmp_path / "out"), code=2)
    assert "unexpected tensor decoder.layers.{layer}.mlp.our_gate.weight" in result


FAULTS = {
    "family: lama": "family lama: unknown",
    "family: llama\nrules: []": "unknown key rules; known: checks, family, hf, name, source, trtllm",
    "family: llama\nsource: [{source: a.weight}]": "expected a mapping with source, logical",
    "family: llama\nsource: [{source: a, logical: b, op: split}]": "a: op split is none of same, split_qkv",
    "family: llama\nhf: {rules: [{target: x, inputs: [{logical: y, shard: colum}]}]}": "x: shard colum is none of",
    "family: llama\nhf: {remove: [nothing]}": "remove: nothing: the family has no such target tensor",
    "family: llama\nhf: {rules: [{target: x, inputs: []}]}": "x: has no inputs",
    "family: llama\nhf: 3": "expected a mapping with architecture, config, remove, rules",
    "!!python/object:os.system x": "only plain values are read",
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_of_a_file_are_named(house: tuple[SmallModel, Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    result = run("plan", str(house[1]), "--mapping", str(tmp_path / "bad.yaml"), code=2)
    assert FAULTS[text] in result


def test_code_runs_only_where_it_is_allowed(house: tuple[SmallModel, Path], tmp_path: Path) -> None:
    program = tmp_path / "own.py"
    program.write_text(
        "from pathlib import Path\n"
        "from dist_export.families.mapping import ModelMapping\n"
        f"def make_family(config):\n    return ModelMapping.read(Path({str(tmp_path / 'own.yaml')!r})).family(config)\n"
    )
    folder, output = house[1], tmp_path / "out"
    refused = run("export", str(folder), str(output), "--mapping", str(program), code=2)
    assert "give --allow-mapping-code to run it" in refused and not output.exists()
    run("export", str(folder), str(output), "--mapping", str(program), "--allow-mapping-code", "--target", "hf")
    assert "model.final.weight" in load_file(output / "model.safetensors")
    refused = run("verify", str(folder), str(output), code=2)
    assert "give --allow-mapping-code" in refused
    run("verify", str(folder), str(output), "--allow-mapping-code")
