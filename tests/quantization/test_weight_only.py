"""INT8 and INT4 weights alone: written as they are, with the algorithm; TensorRT-LLM's loader quantises them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.exports import config_of, export, tensors_of
from support.quantizable import export_quantized, llama, same
from support.quantizer_states import properties

from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions


@pytest.mark.parametrize(("algorithm", "name"), [("int8_wo", "W8A16"), ("int4_wo", "W4A16")])
def test_plain_weights_and_the_algorithm(algorithm: str, name: str, tmp_path: Path) -> None:
    checkpoint = llama().write(tmp_path / "c")
    plain = export_quantized(checkpoint, tmp_path / "plain")
    output = export_quantized(checkpoint, tmp_path / "o", algorithm=algorithm)
    expected, found = (tensors_of(folder / "rank0.safetensors") for folder in (plain, output))
    assert found.keys() == expected.keys() and all(same(found[each], expected[each]) for each in found)
    assert config_of(output)["quantization"] == {"quant_algo": name, "kv_cache_quant_algo": None}


def test_nothing_is_looked_for_and_no_torch_imported(tmp_path: Path) -> None:
    output = export(llama().write(tmp_path / "c"), tmp_path / "o", "--quantization", "int8_wo", "--num-processes", 1)
    (process,) = json.loads((output / "export_manifest.json").read_text())["run"]["processes"]
    assert process["peak_memory"] - process["memory_at_start"] < 100 << 20  # torch alone takes twice as much


@pytest.mark.parametrize("num_threads", [1, 2, 64])
def test_operations_of_torch_share_the_cores(num_threads: int, tmp_path: Path) -> None:
    """Or those of several threads and processes, each on all cores, mostly wait for one another."""
    program = (
        "import sys, torch; from dist_export.cli import main\n"
        "code = main(sys.argv[1:]); print(torch.get_num_threads(), file=sys.stderr); sys.exit(code)"
    )
    export = ("export", llama().write(tmp_path / "c"), tmp_path / "o", "--quantization", "fp8_per_channel")
    command = [sys.executable, "-c", program, *map(str, export), "--num-processes", "1", "--num-threads"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.run([*command, str(num_threads)], capture_output=True, text=True, timeout=60, env=environment)
    assert process.returncode == 0, process.stderr
    assert 1 <= int(process.stderr) <= max((os.cpu_count() or 1) // num_threads, 1)


def test_the_kv_cache_keeps_its_scales(tmp_path: Path) -> None:
    output = export_quantized(
        llama().write(tmp_path / "c"), tmp_path / "o", algorithm="int8_wo", kv_cache="int8", kv_cache_scale=0.25
    )
    assert config_of(output)["quantization"] == {"quant_algo": "W8A16", "kv_cache_quant_algo": "INT8"}
    tensors = tensors_of(output / "rank0.safetensors")
    assert same(tensors["transformer.layers.1.attention.kv_cache_scaling_factor"], torch.tensor([0.25]))


def test_sizes_that_the_kernels_do_not_take_are_named(tmp_path: Path) -> None:
    checkpoint = llama().write(tmp_path / "c")
    with pytest.raises(ExportError, match=r"TensorRT-LLM at tp 2 pads these linears, but not their weights") as caught:
        export_quantized(checkpoint, tmp_path / "o", TrtllmOptions(tp_size=2), algorithm="int4_wo")
    assert "1.mlp.linear_fc2 [64, 128]: W4A16 needs sizes that are multiples of 128" in str(caught.value)
    assert "1.mlp.linear_fc1 [128, 64]" in str(caught.value)


def test_exclusions_name_modules_and_weights(tmp_path: Path) -> None:
    """The list is matched against both, and replaces the loader's own."""
    output = export_quantized(
        llama().write(tmp_path / "c"), tmp_path / "o", algorithm="int8_wo", exclude=("decoder.layers.0.mlp.linear_fc2",)
    )
    found = config_of(output)["quantization"]["exclude_modules"]  # type: ignore[index]
    module = "transformer.layers.0.mlp.proj"
    expected = {"*lm_head", "*router", "*vocab_embedding", "*shared_expert_gate.weight"}
    assert expected | {module, f"{module}.weight"} <= {*found}


def test_modelopts_int8_weights(tmp_path: Path) -> None:
    """It rounds them in the forward pass only: what is stored are the weights."""
    model = llama()
    for name in model.linears:
        model.modelopt(name, weight_quantizer=properties(8, axis=0), input_quantizer=properties(8, disabled=True))
        model.amax(name, "weight_quantizer", model.weight(name).abs().amax(1, keepdim=True))
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o")
    assert config_of(output)["quantization"]["quant_algo"] == "W8A16"  # type: ignore[index]
    found = tensors_of(output / "rank0.safetensors")["transformer.layers.1.mlp.proj.weight"]
    assert same(found, model.weight("1.mlp.linear_fc2"))


@pytest.mark.parametrize("algorithm", ["int8_wo", "int4_wo"])
def test_no_hugging_face_form(algorithm: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"export it with --target trtllm"):
        export_quantized(llama().write(tmp_path / "c"), tmp_path / "o", HuggingFaceOptions(), algorithm=algorithm)
