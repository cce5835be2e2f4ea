"""Exports of ModelOpt-quantised checkpoints equal what ModelOpt's own writers make of the same models, byte for byte.

The recorded tensors are hashes (record_modelopt.py). One exception: ModelOpt's Hugging Face writer divides FP8 weights
in bf16, where its writer for TensorRT-LLM, and this exporter, divide in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import config_of, fingerprints
from support.modelopt_models import (
    DENSE,
    E2M1,
    E4M3,
    MOE,
    fused,
    groups,
    megatron_arguments,
    megatron_tensors,
    smoothed,
    transformers_weights,
)
from support.quantizable import Quantizable, export_quantized
from support.quantizer_states import properties

from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions

RECORDED = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "data").glob("*.json"))}
BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": E4M3}
TOKENS = {-1: None, "type": "dynamic"}
QUANTIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FP8_DEFAULT_CFG": ({"num_bits": E4M3}, {"num_bits": E4M3}),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": ({"num_bits": E4M3, "axis": 0}, {"num_bits": E4M3, "block_sizes": TOKENS}),
    "NVFP4_DEFAULT_CFG": ({"num_bits": E2M1, "block_sizes": BLOCKS}, {"num_bits": E2M1, "block_sizes": BLOCKS}),
}


def checkpoint_of(recorded: dict[str, Any], folder: Path, *, grouped: bool = False) -> Path:
    """The Megatron checkpoint of a recorded model."""
    shape = MOE if any(".experts." in name for name in recorded["calibration"]) else DENSE
    weights, found = transformers_weights(shape), recorded["calibration"]
    for name, parts in groups(shape).items():
        factor = _factor(found[name])
        for part in parts:
            weights[f"{part}.weight"] = smoothed(weights[f"{part}.weight"], factor)
    model = Quantizable(megatron_arguments(shape), megatron_tensors(shape, weights))
    for name, parts in groups(shape).items():
        rows = fused(shape, name, [weights[f"{part}.weight"] for part in parts])
        _quantizers(model, name, rows, recorded["config"], found[name])
    for layer in range(shape.num_layers):
        if f"{layer}.kv" in found:
            name = f"{layer}.self_attention.core_attention"
            quantizers = {f"{part}_bmm_quantizer": properties(E4M3) for part in "kv"}
            model.modelopt(name, **quantizers)
            for part, amax in zip("kv", found[f"{layer}.kv"], strict=True):
                model.amax(name, f"{part}_bmm_quantizer", amax)
    if grouped:
        group_experts(model, shape.num_experts)
    return model.write(folder)


def _factor(found: dict[str, Any]) -> torch.Tensor | None:
    return None if found["factor"] is None else torch.tensor(found["factor"], dtype=torch.int16).view(torch.bfloat16)


def _quantizers(model: Quantizable, name: str, rows: torch.Tensor, config: str, found: dict[str, Any]) -> None:
    factor = _factor(found)
    if config == "W4A8_AWQ_BETA_CFG":
        levels = {
            "weight_quantizer.0": properties(4, block_sizes={-1: 128, "type": "static"}),
            "weight_quantizer.1": properties(E4M3),
        }
        assert factor is not None
        buffers = ("_amax", "_pre_quant_scale")
        model.modelopt(name, **levels, input_quantizer=properties(E4M3, buffers=buffers))
        blocks = rows.reshape(len(rows), -1, 128).abs().amax(-1).float()
        model.amax(name, "weight_quantizer.0", blocks)
        model.amax(name, "weight_quantizer.1", rows.abs().max().reshape(1))
        model.amax(name, "input_quantizer", factor, quantity="_pre_quant_scale")
    else:
        weight, inputs = ({**each} for each in QUANTIZERS[config])
        model.modelopt(
            name,
            weight_quantizer=properties(weight.pop("num_bits"), **weight),
            input_quantizer=properties(inputs.pop("num_bits"), **inputs),
        )
        by_row = QUANTIZERS[config][0].get("axis") == 0
        amax = rows.abs().amax(1, keepdim=True) if by_row else rows.abs().max().reshape(1)
        model.amax(name, "weight_quantizer", amax)
    if found["input"] is not None:
        model.amax(name, "input_quantizer", found["input"])


def group_experts(model: Quantizable, num_experts: int) -> None:
    """As ModelOpt saves TransformerEngine's grouped linear: weight amax with an axis of experts, one common input."""
    stacked: dict[str, list[torch.Tensor]] = {}
    for name in [name for name in model.tensors if ".experts.experts.0." in name]:
        names = [name.replace(".experts.0.", f".experts.{expert}.") for expert in range(num_experts)]
        stacked[name.replace(".experts.0.", ".experts.")] = [model.tensors.pop(each) for each in names]
    for name, parts in stacked.items():
        if ".input_quantizer." in name:
            model.tensors[name] = torch.stack(parts).max().reshape(1)
        else:
            model.tensors[name] = torch.stack([part.reshape(()) if part.numel() == 1 else part for part in parts])
    for name in [name for name in model.objects if ".experts.experts." in name]:
        expert = name.split(".experts.experts.")[1].split(".")[0]
        grouped = name.replace(f".experts.{expert}.", ".experts.").replace("shard_0_1", f"shard_{expert}_{num_experts}")
        model.objects[grouped] = model.objects.pop(name)


def check_tensorrt_llm(recorded: dict[str, Any], checkpoint: Path, output: Path, tp: int) -> None:
    expected = recorded["layouts"][f"tp{tp}"]
    export_quantized(checkpoint, output, TrtllmOptions(tp_size=tp))
    for rank, tensors in enumerate(expected["ranks"]):
        found = fingerprints(output / f"rank{rank}.safetensors")
        assert _loaded(found) == _loaded(tensors)
    table = dict(config_of(output)["quantization"])  # type: ignore[call-overload]
    if table["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN":
        assert table.pop("exclude_modules") == ["lm_head", "*ln_f", "*ln_embed"]  # 0.15 to 0.17 know only the list
        table["exclude_modules"] = ["lm_head"]
    table["exclude_modules"] = sorted(table["exclude_modules"])
    assert table == {**expected["quantization"], "exclude_modules": sorted(expected["quantization"]["exclude_modules"])}


def _loaded(tensors: dict[str, Any]) -> dict[str, Any]:
    """Scalars with no dim are loaded as such with one."""
    return {name: {**each, "shape": each["shape"] or [1]} for name, each in tensors.items()}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("scheme", RECORDED)
def test_tensorrt_llm(scheme: str, tp: int, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(RECORDED[scheme], tmp_path / "c")
    check_tensorrt_llm(RECORDED[scheme], checkpoint, tmp_path / "o", tp)


@pytest.mark.parametrize("scheme", ["moe_fp8", "moe_nvfp4"])
def test_grouped_experts(scheme: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(RECORDED[scheme], tmp_path / "c", grouped=True)
    check_tensorrt_llm(RECORDED[scheme], checkpoint, tmp_path / "o", 2)


@pytest.mark.parametrize("scheme", [name for name in RECORDED if "w4a8" not in name])
def test_hugging_face(scheme: str, tmp_path: Path) -> None:
    recorded = RECORDED[scheme]["huggingface"]
    output = export_quantized(checkpoint_of(RECORDED[scheme], tmp_path / "c"), tmp_path / "o", HuggingFaceOptions())
    found, expected = fingerprints(output / "model.safetensors"), recorded["tensors"]
    if RECORDED[scheme]["config"] == "FP8_DEFAULT_CFG":
        for name, each in expected.items():
            if each["dtype"] == "F8_E4M3":
                found[name]["sha256"] = each["sha256"]
    assert found == expected
    assert config_of(output)["quantization_config"] == recorded["quantization_config"]
    assert json.loads((output / "hf_quant_config.json").read_text()) == recorded["hf_quant_config"]
