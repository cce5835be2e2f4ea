"""FP8 and NVFP4 weights that ModelOpt has stored quantised (mtq.compress): taken over as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import tensors_of
from support.quantizable import E4M3, Quantizable, export_quantized, fp8_codes, llama, same
from support.quantizer_states import properties
from support.torch_dist import Chunk

from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions

BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": E4M3}
PACKED = {"modelopt_q_tensor_state": {"weight": {"metadata": {}}}}


def compressed(model: Quantizable, num_bits: Any, **more: Any) -> Quantizable:
    """With the states of compressed linears."""
    from support.quantizer_states import modelopt_state

    for name in model.linears:
        quantizers = {
            "weight_quantizer": properties(num_bits, fake_quant=False, buffers=("_amax", "_scale"), **more),
            "input_quantizer": properties(num_bits, **more),
        }
        model.objects[f"decoder.layers.{name}._extra_state/shard_0_1"] = [modelopt_state(quantizers, **PACKED)]
        model.amax(name, "weight_quantizer", model.weight(name).abs().max().reshape(1))
        model.amax(name, "input_quantizer", 2.0)
    return model


def fp8_weights() -> Quantizable:
    """As FP8QTensor stores them: the scale is divided and kept in bf16 (modelopt/torch/quantization/qtensor)."""
    model = compressed(llama(), E4M3)
    for name in model.linears:
        weight = model.weight(name)
        scale = weight.abs().max() / 448.0
        model.tensors[f"decoder.layers.{name}.weight"] = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        model.amax(name, "weight_quantizer", scale.reshape(()), quantity="_scale")
    return model


def test_fp8_codes_keep_their_rounded_scale(tmp_path: Path) -> None:
    """amax / 448 in float32 is another number, with which the codes would mean something else."""
    model = fp8_weights()
    checkpoint = model.write(tmp_path / "c")
    output = export_quantized(checkpoint, tmp_path / "o", TrtllmOptions(tp_size=2))
    for rank in range(2):
        tensors = tensors_of(output / f"rank{rank}.safetensors")
        for name, source in (("mlp.proj", "mlp.linear_fc2"), ("attention.dense", "self_attention.linear_proj")):
            scale = model.tensors[f"decoder.layers.1.{source}.weight_quantizer._scale"]
            head = f"transformer.layers.1.{name}."
            assert same(tensors[f"{head}weights_scaling_factor"], scale.float().reshape(1))
            codes = model.weight(f"1.{source}").view(torch.uint8).chunk(2, 1)[rank]
            assert same(tensors[f"{head}weight"].view(torch.uint8), codes)
    hf = tensors_of(export_quantized(checkpoint, tmp_path / "hf", HuggingFaceOptions()) / "model.safetensors")
    scale = model.tensors["decoder.layers.0.mlp.linear_fc1.weight_quantizer._scale"].float()
    assert same(hf["model.layers.0.mlp.gate_proj.weight_scale"], scale)
    assert same(hf["model.layers.0.mlp.up_proj.weight"], model.weight("0.mlp.linear_fc1")[128:])


def nvfp4_weights(tp: int) -> Quantizable:
    """Packed weights and block scales of random bytes; those of a gated fc1 as tp training ranks held them."""
    model, generator = compressed(llama(), (2, 1), block_sizes=BLOCKS), torch.Generator().manual_seed(5)
    for name in model.linears:
        rows, columns = model.weight(name).shape
        packed = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randint(0, 120, (rows, columns // 16), generator=generator, dtype=torch.uint8)
        model.tensors[f"decoder.layers.{name}.weight"] = packed
        key = f"decoder.layers.{name}.weight_quantizer."
        del model.tensors[f"{key}_amax"]
        if name.endswith("fc1"):
            scales = scales.reshape(2, tp, -1, columns // 16).transpose(0, 1).reshape(rows, -1).clone()
        model.tensors[f"{key}_scale"] = scales.view(torch.float8_e4m3fn)
        model.tensors[f"{key}_double_scale"] = torch.tensor(0.001 * len(name))
    return model


@pytest.mark.parametrize("training_tp", [1, 2])
def test_nvfp4_is_taken_over(training_tp: int, tmp_path: Path) -> None:
    model = nvfp4_weights(training_tp)

    def chunks(name: str, tensor: torch.Tensor) -> Iterator[Chunk]:
        parts = training_tp if name.endswith("linear_fc1.weight_quantizer._scale") else 1
        for rank in range(parts):
            start, size = [0] * tensor.dim(), list(tensor.shape)
            if parts > 1:
                start[0], size[0] = rank * len(tensor) // parts, len(tensor) // parts
            yield rank, tuple(start), tuple(size)

    checkpoint = model.write(tmp_path / "c", chunks=chunks)
    output = export_quantized(checkpoint, tmp_path / "o", TrtllmOptions(tp_size=2))
    for rank in range(2):
        tensors = tensors_of(output / f"rank{rank}.safetensors")
        head = "transformer.layers.0.mlp."
        assert same(tensors[f"{head}proj.weight"], model.weight("0.mlp.linear_fc2").chunk(2, 1)[rank])
        key = "decoder.layers.0.mlp.linear_fc{}.weight_quantizer."
        scales = model.tensors[key.format(2) + "_scale"].view(torch.uint8).chunk(2, 1)[rank]
        assert same(tensors[f"{head}proj.weights_scaling_factor"].view(torch.uint8), scales)
        double = model.tensors[key.format(2) + "_double_scale"]
        assert same(tensors[f"{head}proj.weights_scaling_factor_2"], double)
        stored = model.tensors[key.format(1) + "_scale"].view(torch.uint8)
        ordered = stored.reshape(training_tp, 2, -1, stored.shape[1]).transpose(0, 1).reshape(stored.shape)
        for name, half, weight in zip(
            ("fc", "gate"), ordered.chunk(2), model.weight("0.mlp.linear_fc1").chunk(2), strict=True
        ):
            assert same(tensors[f"{head}{name}.weights_scaling_factor"].view(torch.uint8), half.chunk(2)[rank])
            assert same(tensors[f"{head}{name}.weight"], weight.chunk(2)[rank])


def test_scales_that_are_missing_or_no_numbers(tmp_path: Path) -> None:
    model = fp8_weights()
    key = "decoder.layers.0.mlp.linear_fc2.weight_quantizer._scale"
    model.tensors[key] = torch.tensor(float("nan"), dtype=torch.bfloat16)
    with pytest.raises(ExportError, match=r"0.mlp.linear_fc2: scale of its weight is nan"):
        export_quantized(model.write(tmp_path / "a"), tmp_path / "o")
    del model.tensors[key]
    with pytest.raises(ExportError, match=r"0.mlp.linear_fc2: its weight is stored quantised, but its _scale"):
        export_quantized(model.write(tmp_path / "b"), tmp_path / "o")


def test_weights_that_are_not_what_their_state_says(tmp_path: Path) -> None:
    model = fp8_weights()
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    model.tensors[name] = model.tensors[name].to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"its weight is stored as bfloat16, expected float8_e4m3fn codes"):
        export_quantized(model.write(tmp_path / "c"), tmp_path / "o")


def test_codes_that_are_no_numbers(tmp_path: Path) -> None:
    model = fp8_weights()
    model.weight("1.mlp.linear_fc2").view(torch.uint8)[3, 7] = 0x7F
    with pytest.raises(ExportError, match=r"layers.1.mlp.proj.weight: holds NaN codes"):
        export_quantized(model.write(tmp_path / "c"), tmp_path / "o")


def test_codes_are_those_of_their_definition() -> None:
    """The test's own FP8 weights: in bf16 as ModelOpt compresses, so not those that the exporter would make."""
    weight, model = llama().weight("0.mlp.linear_fc2"), fp8_weights()
    exact = fp8_codes(weight, weight.float().abs().max() / 448)
    assert not same(exact, model.weight("0.mlp.linear_fc2"))
