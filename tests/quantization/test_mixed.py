"""Models of which some linears are not quantised, or differently: what configurations list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import config_of, tensors_of
from support.quantizable import E4M3, Quantizable, export_quantized, fp8_codes, llama, mixtral, same
from support.quantizer_states import properties

from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions

BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": E4M3}


def with_plain(model: Quantizable, *plain: str) -> Quantizable:
    """FP8 by ModelOpt, but for the linears whose names hold one of `plain`."""
    model.fp8(lambda name: 2.5)
    for name in model.linears:
        if any(each in name for each in plain):
            model.modelopt(
                name, weight_quantizer=properties(E4M3, disabled=True), input_quantizer=properties(E4M3, disabled=True)
            )
            for quantizer in ("weight_quantizer", "input_quantizer"):
                del model.tensors[f"decoder.layers.{name}.{quantizer}._amax"]
    return model


def test_linears_that_modelopt_left_out(tmp_path: Path) -> None:
    model = with_plain(llama(), "0.mlp.linear_fc2", "1.self_attention")
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o")
    excluded = ["0.mlp.proj", "1.attention.qkv", "1.attention.dense"]
    assert config_of(output)["quantization"] == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head", *(f"transformer.layers.{name}" for name in excluded)],
    }
    tensors = tensors_of(output / "rank0.safetensors")
    assert same(tensors["transformer.layers.0.mlp.proj.weight"], model.weight("0.mlp.linear_fc2"))
    assert "transformer.layers.1.attention.qkv.weights_scaling_factor" not in tensors
    weight = model.weight("1.mlp.linear_fc2")
    codes = fp8_codes(weight, weight.abs().max().float() / 448)
    assert same(tensors["transformer.layers.1.mlp.proj.weight"], codes)


def test_pipeline_stages_number_layers_alike(tmp_path: Path) -> None:
    """What a name leaves out, it leaves out in every stage."""
    uneven = with_plain(llama(), "0.mlp.linear_fc2").write(tmp_path / "a")
    with pytest.raises(ExportError, match=r"pp 2: TensorRT-LLM numbers layers within a pipeline stage, so .*mlp.proj"):
        export_quantized(uneven, tmp_path / "o", TrtllmOptions(pp_size=2))
    even = with_plain(llama(), "mlp.linear_fc2").write(tmp_path / "b")
    output = export_quantized(even, tmp_path / "o", TrtllmOptions(pp_size=2))
    found = config_of(output)["quantization"]["exclude_modules"]  # type: ignore[index]
    assert found == ["lm_head", "transformer.layers.0.mlp.proj"]


def test_experts_are_left_out_as_a_whole(tmp_path: Path) -> None:
    """The engine quantises a layer's experts when it makes them: it is their module that is named."""
    model = with_plain(mixtral(), "0.mlp.experts")
    output = export_quantized(model.write(tmp_path / "a"), tmp_path / "o")
    routers = [f"transformer.layers.{layer}.mlp.router" for layer in range(2)]
    found = config_of(output)["quantization"]["exclude_modules"]  # type: ignore[index]
    assert found == ["lm_head", *routers, "transformer.layers.0.mlp"]
    half = with_plain(mixtral(), "linear_fc2").write(tmp_path / "b")
    with pytest.raises(ExportError, match="fc1 and fc2 of experts must be quantised alike"):
        export_quantized(half, tmp_path / "p")
    one = with_plain(mixtral(), "0.mlp.experts.experts.2").write(tmp_path / "d")
    with pytest.raises(ExportError, match=r"layers.0.mlp.fc: its parts are quantised differently: FP8, none"):
        export_quantized(one, tmp_path / "p")


def two_schemes() -> Quantizable:
    """FP8, but for fc2 in NVFP4."""
    model = llama().fp8(lambda name: 2.5)
    for name in model.linears:
        if name.endswith("fc2"):
            quantizer = properties((2, 1), block_sizes=BLOCKS)
            model.modelopt(name, weight_quantizer=quantizer, input_quantizer=quantizer)
    return model


def test_two_schemes_in_one_model(tmp_path: Path) -> None:
    checkpoint = two_schemes().write(tmp_path / "c")
    output = export_quantized(checkpoint, tmp_path / "o")
    assert config_of(output)["quantization"] == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    layers: dict[str, Any] = {}
    for layer in range(2):
        for name in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate"):
            layers[f"transformer.layers.{layer}.{name}"] = {"quant_algo": "FP8"}
        layers[f"transformer.layers.{layer}.mlp.proj"] = {"quant_algo": "NVFP4", "group_size": 16}
    found = json.loads((output / "quant_cfg.json").read_text())
    assert found == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    tensors = tensors_of(output / "rank0.safetensors")
    assert tensors["transformer.layers.0.mlp.proj.weight"].dtype == torch.uint8
    assert tensors["transformer.layers.0.mlp.fc.weight"].dtype == torch.float8_e4m3fn


def test_two_schemes_in_a_hugging_face_folder(tmp_path: Path) -> None:
    """vLLM looks up every linear; fused ones by their parts."""
    checkpoint = two_schemes().write(tmp_path / "c")
    output = export_quantized(checkpoint, tmp_path / "o", HuggingFaceOptions(), exclude=("decoder.layers.1.mlp.*",))
    layers: dict[str, Any] = {
        f"model.layers.{layer}.self_attn.{name}_proj": {"quant_algo": "FP8"} for layer in range(2) for name in "qkvo"
    }
    layers |= {f"model.layers.0.mlp.{name}_proj": {"quant_algo": "FP8"} for name in ("gate", "up")}
    layers["model.layers.0.mlp.down_proj"] = {"quant_algo": "NVFP4", "group_size": 16}
    table = json.loads((output / "hf_quant_config.json").read_text())["quantization"]
    entry: Any = config_of(output)["quantization_config"]
    assert table["quant_algo"] == entry["quant_algo"] == "MIXED_PRECISION"
    assert table["quantized_layers"] == entry["quantized_layers"] == layers
    ignored = ["lm_head", "model.embed_tokens", *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))]
    assert sorted(table["exclude_modules"]) == sorted(entry["ignore"]) == sorted(ignored)
    tensors = tensors_of(output / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32


def test_schemes_that_no_runtime_reads_together(tmp_path: Path) -> None:
    model = llama().fp8(lambda name: 2.5)
    name = "0.mlp.linear_fc2"
    model.modelopt(name, weight_quantizer=properties(8, axis=0), input_quantizer=properties(8))
    model.amax(name, "weight_quantizer", model.weight(name).abs().amax(1, keepdim=True))
    with pytest.raises(ExportError, match="no runtime reads W8A8_SQ_PER_CHANNEL and other schemes in one folder"):
        export_quantized(model.write(tmp_path / "c"), tmp_path / "o", HuggingFaceOptions())


@pytest.mark.parametrize(("release", "message"), [("1.0", "not 1.0"), ("0.14", "NVFP4 is in TensorRT-LLM 0.17")])
def test_releases_that_cannot_read_it(release: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_quantized(two_schemes().write(tmp_path / "c"), tmp_path / "o", TrtllmOptions(release=release))


def test_plain_and_int8_sq_experts(tmp_path: Path) -> None:
    model = mixtral()
    for name in model.linears:
        model.modelopt(name, weight_quantizer=properties(8, axis=0), input_quantizer=properties(8))
        model.amax(name, "weight_quantizer", model.weight(name).abs().amax(1, keepdim=True))
        model.amax(name, "input_quantizer", 3.0)
    with pytest.raises(ExportError, match="experts in W8A8_SQ_PER_CHANNEL cannot be exported: no release"):
        export_quantized(model.write(tmp_path / "c"), tmp_path / "o")


def test_smoothed_weights_cannot_be_left_out(tmp_path: Path) -> None:
    model = llama(hidden_size=128, ffn_hidden_size=128, kv_channels=32)
    for name in model.linears:
        model.modelopt(name, weight_quantizer=properties(4, block_sizes={-1: 128, "type": "static"}))
        model.amax(name, "weight_quantizer", model.weight(name).abs().amax(1, keepdim=True))
        model.amax(name, "input_quantizer", torch.ones(128, dtype=torch.bfloat16), quantity="_pre_quant_scale")
    checkpoint = model.write(tmp_path / "c")
    with pytest.raises(ExportError, match=r"--exclude: the weight is stored smoothed.*0.mlp.linear_fc2"):
        export_quantized(checkpoint, tmp_path / "o", exclude=("decoder.layers.0.mlp.linear_fc2",))
    export_quantized(checkpoint, tmp_path / "o")


def test_fused_parts_of_hugging_face(tmp_path: Path) -> None:
    model = with_plain(llama(), "1.self_attention.linear_qkv")
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o", HuggingFaceOptions())
    found = json.loads((output / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"} <= {*found}
    assert not any("layers.0." in name for name in found)
