"""Scales of the KV cache: calibrated, trained, or given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.exports import config_of, tensors_of
from support.quantizable import E4M3, Quantizable, export_quantized, llama, same
from support.quantizer_states import properties, te_state

from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions

ATTENTION = "{}.self_attention.core_attention"
NAMES = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")


def scales_of(output: Path, layer: int) -> list[float]:
    """Of keys, values, and both, in a TensorRT-LLM export."""
    tensors = tensors_of(output / "rank0.safetensors")
    found = [tensors[f"transformer.layers.{layer}.attention.{name}"] for name in NAMES]
    assert all(each.dtype == torch.float32 and each.shape == (1,) for each in found)
    return [each.item() for each in found]


def calibration(path: Path, **amax: float) -> Path:
    """A calibration file: ``k`` and ``v`` of layer 0, ten times as much of layer 1."""
    name = "decoder.layers.{}.self_attention.core_attention.{}_bmm_quantizer._amax"
    tensors = {
        name.format(layer, part): torch.tensor(value * 10**layer) for part, value in amax.items() for layer in range(2)
    }
    save_file(tensors, path)
    return path


def test_fp8_scales_are_at_least_1_for_engines_only(tmp_path: Path) -> None:
    checkpoint, amax = llama().write(tmp_path / "c"), calibration(tmp_path / "amax.safetensors", k=89.6, v=22.4)
    output = export_quantized(checkpoint, tmp_path / "o", calibration=amax, kv_cache="fp8")
    assert scales_of(output, 0) == [1.0, 1.0, 1.0]
    assert scales_of(output, 1) == [2.0, 1.0, 2.0]
    assert config_of(output)["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    target = HuggingFaceOptions(quantization_format="modelopt")
    hf = export_quantized(checkpoint, tmp_path / "hf", target, calibration=amax, kv_cache="fp8")
    tensors = tensors_of(hf / "model.safetensors")
    assert same(tensors["model.layers.0.self_attn.k_proj.k_scale"], torch.tensor(89.6) / 448)
    assert same(tensors["model.layers.1.self_attn.v_proj.v_scale"], torch.tensor(224.0) / 448)


def test_int8_scales_are_never_raised_to_1(tmp_path: Path) -> None:
    amax = calibration(tmp_path / "amax.safetensors", k=12.7, v=25.4)
    output = export_quantized(llama().write(tmp_path / "c"), tmp_path / "o", calibration=amax, kv_cache="int8")
    expected = [float(torch.tensor(value) / 127) for value in (12.7, 25.4, 25.4)]
    assert scales_of(output, 0) == expected
    assert config_of(output)["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": "INT8"}


def test_the_layers_own_quantisers(tmp_path: Path) -> None:
    """As ModelOpt from 0.40 on saves them; nothing has to be asked for."""
    model = llama().fp8(lambda name: 2.5)
    for layer in range(2):
        name = ATTENTION.format(layer)
        model.modelopt(name, k_bmm_quantizer=properties(E4M3), v_bmm_quantizer=properties(E4M3))
        model.amax(name, "k_bmm_quantizer", 896.0)
        model.amax(name, "v_bmm_quantizer", 448.0 * (1 + 2 * layer))
    checkpoint = model.write(tmp_path / "c")
    output = export_quantized(checkpoint, tmp_path / "o")
    assert [scales_of(output, layer) for layer in range(2)] == [[2.0, 1.0, 2.0], [2.0, 3.0, 3.0]]
    assert config_of(output)["quantization"]["kv_cache_quant_algo"] == "FP8"  # type: ignore[index]
    plain = tensors_of(export_quantized(checkpoint, tmp_path / "p", kv_cache="none") / "rank0.safetensors")
    assert not any(name.endswith("_cache_scaling_factor") for name in plain)


@pytest.mark.parametrize(("num_bits", "scale", "name"), [(E4M3, 10 / 448, "FP8"), (8, 10 / 127, "INT8")])
def test_the_output_of_qkv_in_older_checkpoints(num_bits: Any, scale: float, name: str, tmp_path: Path) -> None:
    model = llama().fp8(lambda name: 2.5)
    for layer in range(2):
        qkv = f"{layer}.self_attention.linear_qkv"
        own = {"weight_quantizer": properties(E4M3), "input_quantizer": properties(E4M3)}
        model.modelopt(qkv, **own, output_quantizer=properties(num_bits))
        model.amax(qkv, "output_quantizer", 10.0)
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o")
    assert config_of(output)["quantization"]["kv_cache_quant_algo"] == name  # type: ignore[index]
    expected = float(torch.tensor(10.0) / (448 if name == "FP8" else 127))
    assert scales_of(output, 0) == [max(expected, 1.0) if name == "FP8" else expected] * 3
    assert expected == pytest.approx(scale)


def test_fp8_attention_in_training(tmp_path: Path) -> None:
    """One scale of query, key and value together: exact, and only when asked for."""
    model: Quantizable = llama()
    for layer in range(2):
        scale = torch.ones(9)
        scale[2] = 0.3 + layer
        state = te_state("2.1", scale, torch.stack([0 * scale, 448 / scale]))
        model.objects[f"decoder.layers.{ATTENTION.format(layer)}._extra_state/shard_0_1"] = [state]
    checkpoint = model.write(tmp_path / "c")
    output = export_quantized(checkpoint, tmp_path / "o", kv_cache="fp8")
    assert scales_of(output, 0) == [float(1 / torch.tensor(0.3))] * 3
    assert scales_of(output, 1) == [1.0] * 3
    plain = tensors_of(export_quantized(checkpoint, tmp_path / "p") / "rank0.safetensors")
    assert not any(name.endswith("_cache_scaling_factor") for name in plain)
    with pytest.raises(ExportError, match="KV cache in INT8: 2 faults"):
        export_quantized(checkpoint, tmp_path / "q", kv_cache="int8")


def test_given_scales(tmp_path: Path) -> None:
    output = export_quantized(llama().write(tmp_path / "c"), tmp_path / "o", kv_cache_scale=0.5)
    assert scales_of(output, 1) == [0.5] * 3
    assert config_of(output)["quantization"]["kv_cache_quant_algo"] == "FP8"  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": "fp8"}, r"layer 0: neither the checkpoint nor a calibration file.*--kv-cache-scale"),
        ({"kv_cache_scale": 0.0}, "--kv-cache-scale 0: expected a positive number"),
        ({"kv_cache_scale": float("nan")}, "--kv-cache-scale nan: expected a positive number"),
        ({"kv_cache_scale": 2.0, "kv_cache": "none"}, "a KV cache that is quantised"),
    ],
)
def test_without_a_scale_that_can_be_used(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_quantized(llama().write(tmp_path / "c"), tmp_path / "o", **options)


def test_values_that_are_no_amax(tmp_path: Path) -> None:
    amax = calibration(tmp_path / "amax.safetensors", k=float("nan"), v=0.0)
    with pytest.raises(ExportError) as caught:
        export_quantized(llama().write(tmp_path / "c"), tmp_path / "o", calibration=amax, kv_cache="fp8")
    assert "0.self_attention.core_attention.key: amax of its input is nan" in str(caught.value)
    assert "1.self_attention.core_attention.value: amax of its input is 0" in str(caught.value)


def test_no_int8_in_hugging_face_folders(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="an INT8 KV cache has no Hugging Face form"):
        export_quantized(
            llama().write(tmp_path / "c"), tmp_path / "o", HuggingFaceOptions(), kv_cache="int8", kv_cache_scale=0.5
        )
