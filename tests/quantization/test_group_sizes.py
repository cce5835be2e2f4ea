"""INT4 in blocks of other sizes than 128: configurations say the size that the codes and scales have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.exports import config_of, tensors_of
from support.quantizable import Quantizable, export_quantized, llama
from support.quantizer_states import properties

from dist_export.targets.huggingface.target import HuggingFaceOptions


def awq(size: int) -> Quantizable:
    """INT4 in blocks of `size` columns, each with a scale of its own; factors of 1."""
    model = llama(hidden_size=128, ffn_hidden_size=128, kv_channels=32)
    inputs = properties(8, disabled=True, buffers=("_pre_quant_scale",))
    for name in model.linears:
        weight = model.weight(name)
        model.modelopt(
            name, weight_quantizer=properties(4, block_sizes={-1: size, "type": "static"}), input_quantizer=inputs
        )
        model.amax(name, "weight_quantizer", weight.reshape(len(weight), -1, size).abs().amax(-1).float())
        ones = torch.ones(weight.shape[1], dtype=torch.bfloat16)
        model.amax(name, "input_quantizer", ones, quantity="_pre_quant_scale")
    return model


@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_configuration_says_the_size_of_the_blocks(size: int, tmp_path: Path) -> None:
    model = awq(size)
    checkpoint = model.write(tmp_path / "c")
    weight = model.weight("0.mlp.linear_fc2").float()
    scales = weight.reshape(len(weight), -1, size).abs().amax(-1) / 7
    digits = (weight / scales.repeat_interleave(size, 1)).round().clamp(-8, 7).to(torch.int64)
    engine = export_quantized(checkpoint, tmp_path / "engine")
    assert config_of(engine)["quantization"]["group_size"] == size
    tensors = tensors_of(engine / "rank0.safetensors")
    assert torch.equal(tensors["transformer.layers.0.mlp.proj.weights_scaling_factor"], scales)
    packed = HuggingFaceOptions(quantization_format="compressed-tensors")
    folder = export_quantized(checkpoint, tmp_path / "packed", packed)
    table = config_of(folder)["quantization_config"]
    assert table["config_groups"]["group_0"]["weights"]["group_size"] == size
    words = tensors_of(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight_packed"].to(torch.int64)
    found = torch.stack([(words >> 4 * place) & 15 for place in range(8)], -1).reshape(weight.shape) - 8
    assert torch.equal(found, digits)
    plain = HuggingFaceOptions(quantization_format="modelopt")
    folder = export_quantized(checkpoint, tmp_path / "modelopt", plain)
    codes = tensors_of(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].to(torch.int64) & 0xFF
    nibbles = torch.stack([codes & 15, codes >> 4], 1).reshape(weight.shape)
    assert torch.equal(torch.where(nibbles > 7, nibbles - 16, nibbles), digits)
