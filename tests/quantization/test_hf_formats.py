"""Quantised Hugging Face folders: the layouts, and that both mean the same linears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exports import config_of, tensors_of
from support.quantizable import export_quantized, llama, mixtral
from support.quantizer_states import modelopt_state, properties
from support.small_models import LLAMA, NEMOTRON, SmallModel, small_model
from support.torch_dist import write_torch_dist

from dist_export.convert.encode import _int4_words
from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions

Tensors = dict[str, torch.Tensor]
INT4 = properties(4, block_sizes={-1: 128, "type": "static"})
INT8_WEIGHT, INT8_INPUT = properties(8, axis=(0,)), properties(8)
OFF = properties(8, disabled=True)
SHAPES = {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "kv_channels": 32}


def exported(checkpoint: Path, output: Path, layout: str) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and quantization_config."""
    folder = export_quantized(checkpoint, output, HuggingFaceOptions(quantization_format=layout))
    config: Any = config_of(folder)["quantization_config"]
    assert (folder / "hf_quant_config.json").exists() == (config["quant_method"] == "modelopt")
    return tensors_of(folder / "model.safetensors"), config


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """Eight codes of four bits, plus 8, of every 32-bit word."""
    nibbles = (words.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return nibbles.reshape(len(words), -1) - 8


def rows_of_bytes(codes: torch.Tensor) -> torch.Tensor:
    """ModelOpt's INT4: two rows per byte, the even one low."""
    low, high = (codes & 15).to(torch.int64), (codes >> 4).to(torch.int64)
    both = torch.stack([low, high], 1).reshape(-1, codes.shape[1])
    return torch.where(both > 7, both - 16, both)


def test_the_order_of_columns_in_a_word() -> None:
    """As compressed_tensors' own `pack_to_int32` has it."""
    words = _int4_words(torch.arange(-8.0, 8.0).reshape(1, 16), torch.ones(1, 1))
    assert words.tolist() == [[1985229328, -19088744]]


def awq_model(*, style: dict[str, Any] = LLAMA, smooth: bool = False, **args: Any) -> SmallModel:
    """A model with factors, INT4 by block or INT8 by row."""
    model = small_model(style, scale=0.1, **SHAPES, **{"num_query_groups": 4, "add_qkv_bias": True, **args})
    model.tensors = model.per_layer()
    generator = torch.Generator().manual_seed(1)
    for name, weight in [(n, t) for n, t in model.tensors.items() if ".linear_" in n and n.endswith("weight")]:
        if weight.dim() == 2:
            module = name.removesuffix("weight")
            amax = weight.float().abs() if smooth else weight.float().abs().reshape(len(weight), -1, 128)
            amax = amax.amax(-1, keepdim=smooth)
            model.tensors[f"{module}weight_quantizer._amax"] = amax.to(weight.dtype) if smooth else amax
            factor = torch.rand(weight.shape[1], generator=generator) + 0.5
            model.tensors[f"{module}input_quantizer._pre_quant_scale"] = factor.bfloat16()
            if smooth:
                model.tensors[f"{module}input_quantizer._amax"] = torch.full((1,), 5.0)
    return model


def saved(model: SmallModel, folder: Path, *, smooth: bool = False, **quantizers: Any) -> Path:
    """As ModelOpt saves a quantised model."""
    weight, inputs = (INT8_WEIGHT, INT8_INPUT) if smooth else (INT4, {**OFF, **properties(8, disabled=True)})
    state = modelopt_state({"weight_quantizer": weight, "input_quantizer": inputs, "output_quantizer": OFF})
    objects = {}
    for layer in range(2):
        for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
            objects[f"decoder.layers.{layer}.{linear}._extra_state/shard_0_1"] = [state]
    return write_torch_dist(folder / "iter_0000010", model.tensors, args=model.args, extra_objects=objects)


@pytest.mark.parametrize("num_query_groups", [4, 2])
def test_int4_with_every_factor_folded(tmp_path: Path, num_query_groups: int) -> None:
    """Codes are those of ModelOpt's layout; value and up take the factor of what is behind them into their scales."""
    model = awq_model(num_query_groups=num_query_groups)
    checkpoint = saved(model, tmp_path / "c")
    theirs, _ = exported(checkpoint, tmp_path / "a", "modelopt")
    ours, config = exported(checkpoint, tmp_path / "b", "auto")
    assert config["format"] == "pack-quantized" and config["config_groups"]["group_0"]["weights"]["group_size"] == 128
    kept = num_query_groups == 2
    assert config["ignore"] == ["lm_head", *(f"model.layers.{n}.self_attn.o_proj" for n in range(2) if kept)]
    layer = "model.layers.1."
    factors = {
        part: model.tensors[f"decoder.layers.1.{part}.input_quantizer._pre_quant_scale"].float()
        for part in ("self_attention.linear_proj", "mlp.linear_fc2")
    }
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        linear = f"{layer}{name}_proj."
        if name == "self_attn.o" and kept:
            weight = model.tensors["decoder.layers.1.self_attention.linear_proj.weight"]
            assert torch.equal(
                ours[f"{linear}weight"], (weight.float() * factors["self_attention.linear_proj"]).bfloat16()
            )
            continue
        codes = ours[f"{linear}weight_packed"]
        assert codes.dtype is torch.int32
        assert torch.equal(unpacked(codes), rows_of_bytes(theirs[f"{linear}weight"]))
        scale = theirs[f"{linear}weight_scale"]
        if name == "self_attn.v" and not kept:
            scale = scale * factors["self_attention.linear_proj"][:, None]
        if name == "mlp.up":
            scale = scale * factors["mlp.linear_fc2"][:, None]
        assert torch.equal(ours[f"{linear}weight_scale"], scale.bfloat16())
        assert ours[f"{linear}weight_shape"].tolist() == [len(scale), codes.shape[1] * 8]
        assert ours[f"{linear}weight_shape"].dtype is torch.int64
    norms = [name for name in theirs if "norm" in name or "lm_head" in name or "q_proj.bias" in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in norms)
    bias = theirs[f"{layer}self_attn.v_proj.bias"].float()
    wanted = bias if kept else bias * factors["self_attention.linear_proj"]
    assert torch.equal(ours[f"{layer}self_attn.v_proj.bias"], wanted.bfloat16())
    assert not any("pre_quant_scale" in name for name in ours)


def test_int8_smoothquant(tmp_path: Path) -> None:
    model = awq_model(smooth=True)
    checkpoint = saved(model, tmp_path / "c", smooth=True)
    with pytest.raises(
        ExportError, match="no runtime reads W8A8_SQ_PER_CHANNEL in ModelOpt's Hugging Face layout; give"
    ):
        exported(checkpoint, tmp_path / "a", "modelopt")
    ours, config = exported(checkpoint, tmp_path / "b", "auto")
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "tensor"
    up = "model.layers.0.mlp.up_proj."
    weight = model.tensors["decoder.layers.0.mlp.linear_fc1.weight"].float()[256:]
    amax = model.tensors["decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax"].float()[256:]
    factor = model.tensors["decoder.layers.0.mlp.linear_fc2.input_quantizer._pre_quant_scale"].float()
    assert torch.equal(ours[up + "weight"], (weight / (amax / 127)).round().to(torch.int8))
    assert torch.equal(ours[up + "weight_scale"], amax / 127 * factor[:, None])
    assert ours[up + "weight_scale"].shape == (256, 1) and ours[up + "weight_scale"].dtype is torch.float32
    assert torch.equal(ours[up + "input_scale"], torch.full((1,), 5.0) / 127)


def test_values_of_a_quantised_cache_take_no_factor(tmp_path: Path) -> None:
    """Their scale in the cache is that of values as they were calibrated: attention's output keeps its precision."""
    model = awq_model()
    checkpoint = saved(model, tmp_path / "c")
    target = HuggingFaceOptions(quantization_format="compressed-tensors")
    folder = export_quantized(checkpoint, tmp_path / "o", target, kv_cache="fp8", kv_cache_scale=0.25)
    tensors, layer = tensors_of(folder / "model.safetensors"), "model.layers.0.self_attn."
    assert f"{layer}o_proj" in config_of(folder)["quantization_config"]["ignore"]  # type: ignore[index]
    weight = model.tensors["decoder.layers.0.self_attention.linear_proj.weight"].float()
    factor = model.tensors["decoder.layers.0.self_attention.linear_proj.input_quantizer._pre_quant_scale"].float()
    assert torch.equal(tensors[f"{layer}o_proj.weight"], (weight * factor).bfloat16())
    plain, _ = exported(checkpoint, tmp_path / "p", "modelopt")
    assert torch.equal(tensors[f"{layer}v_proj.weight_scale"], plain[f"{layer}v_proj.weight_scale"].bfloat16())
    assert torch.equal(tensors[f"{layer}v_proj.bias"], plain[f"{layer}v_proj.bias"])


def test_int4_without_a_gate(tmp_path: Path) -> None:
    """No linear in front can take the factor of fc2: an activation lies between."""
    model = awq_model(style=NEMOTRON, add_qkv_bias=False)
    checkpoint = saved(model, tmp_path / "c")
    theirs, _ = exported(checkpoint, tmp_path / "a", "modelopt")
    ours, config = exported(checkpoint, tmp_path / "b", "auto")
    assert config["ignore"] == ["lm_head", *(f"model.layers.{n}.mlp.down_proj" for n in range(2))]
    module = "decoder.layers.0.mlp.linear_fc2."
    factor = model.tensors[module + "input_quantizer._pre_quant_scale"].float()
    wanted = (model.tensors[module + "weight"].float() * factor).bfloat16()
    assert torch.equal(ours["model.layers.0.mlp.down_proj.weight"], wanted)
    assert "model.layers.0.self_attn.o_proj.weight_packed" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "norm" in name)
    for target, linear in (("input", "self_attention.linear_qkv"), ("post_attention", "mlp.linear_fc1")):
        factor = model.tensors[f"decoder.layers.1.{linear}.input_quantizer._pre_quant_scale"].float()
        weight, bias = (model.tensors[f"decoder.layers.1.{linear}.layer_norm_{kind}"] for kind in ("weight", "bias"))
        stored = f"model.layers.1.{target}_layernorm."  # gamma - 1, which Megatron stores, too
        assert torch.equal(ours[stored + "weight"], ((weight.float() + 1) * factor - 1).bfloat16())
        assert torch.equal(ours[stored + "bias"], (bias.float() * factor).bfloat16())


def test_nvfp4_with_factors(tmp_path: Path) -> None:
    """Its scales of blocks take no factor, which ModelOpt's layout has a place for and vLLM does not read: TensorRT-LLM
    does, as a calibration recipe of NVFP4 (tensorrt_llm/_torch/modules/linear.py, NVFP4LinearMethod)."""
    model = llama()
    kind = properties((2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})
    for name in model.linears:
        inputs = {**kind, **properties((2, 1), buffers=("_amax", "_pre_quant_scale"))}
        inputs["_block_sizes"] = kind["_block_sizes"]
        model.modelopt(name, weight_quantizer=kind, input_quantizer=inputs)
        model.amax(name, "weight_quantizer", model.weight(name).abs().max().reshape(1))
        model.amax(name, "input_quantizer", 3.0)
        model.amax(name, "input_quantizer", torch.full(model.weight(name).shape[1:], 2.0), quantity="_pre_quant_scale")
    checkpoint = model.write(tmp_path / "c")
    ours, config = exported(checkpoint, tmp_path / "a", "auto")
    kept = ("self_attn.o_proj", "mlp.down_proj")
    assert config["ignore"] == ["lm_head", *(f"model.layers.{n}.{name}" for n in range(2) for name in kept)]
    weight = model.weight("0.mlp.linear_fc2")
    assert torch.equal(ours["model.layers.0.mlp.down_proj.weight"], weight * 2)
    norm = model.tensors["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"]
    assert torch.equal(ours["model.layers.0.post_attention_layernorm.weight"], norm * 2)
    theirs, config = exported(checkpoint, tmp_path / "b", "modelopt")
    assert config["quant_algo"] == "NVFP4_AWQ"
    table = json.loads((tmp_path / "b" / "hf_quant_config.json").read_text())["quantization"]
    assert {name: table[name] for name in ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale")} == {
        "quant_algo": "NVFP4_AWQ",
        "group_size": 16,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }
    explicit = {name for name in theirs if name.endswith("pre_quant_scale")}
    assert explicit == {f"model.layers.{n}.{name}.pre_quant_scale" for n in range(2) for name in kept}
    factor = theirs["model.layers.0.mlp.down_proj.pre_quant_scale"]
    assert torch.equal(factor, torch.full((128,), 2.0, dtype=torch.bfloat16))
    head = "model.layers.0.mlp.gate_proj."
    assert torch.equal(theirs[f"{head}weight"], ours[f"{head}weight_packed"])
    assert torch.equal(theirs["model.layers.0.post_attention_layernorm.weight"], norm * 2)


def test_w4a8_is_of_tensorrt_llm_alone(tmp_path: Path) -> None:
    model = llama()
    levels = {"weight_quantizer.0": INT4, "weight_quantizer.1": properties((4, 3))}
    for name in model.linears:
        model.modelopt(name, **levels, input_quantizer=properties((4, 3), buffers=("_amax", "_pre_quant_scale")))
        model.amax(name, "weight_quantizer.0", torch.ones(len(model.weight(name)), 1))
        model.amax(name, "weight_quantizer.1", 3.0)
        model.amax(name, "input_quantizer", 3.0)
    with pytest.raises(ExportError, match=r"compressed-tensors has no form for W4A8_AWQ; give --hf-quan.* modelopt"):
        exported(model.write(tmp_path / "c"), tmp_path / "a", "compressed-tensors")


def test_a_factor_in_front_of_a_router(tmp_path: Path) -> None:
    """The norm that would take the factor of the experts' inputs feeds the router, too."""
    model = mixtral()
    for name in model.linears:
        model.modelopt(name, weight_quantizer=INT4, input_quantizer=OFF)
        model.amax(name, "input_quantizer", torch.ones(model.weight(name).shape[1]), quantity="_pre_quant_scale")
    checkpoint = model.write(tmp_path / "c")
    with pytest.raises(ExportError, match=r"linear_fc1: the factor of its activations has no place.*feeds the router"):
        exported(checkpoint, tmp_path / "a", "auto")


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4"])
def test_float_formats_mean_what_modelopts_do(
    scheme: str, quantized_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    theirs, _ = exported(quantized_checkpoints[scheme], tmp_path / "a", "auto")
    ours, config = exported(quantized_checkpoints[scheme], tmp_path / "b", "compressed-tensors")
    assert config["ignore"] == ["lm_head"]
    for name, tensor in theirs.items():
        head, _, last = name.rpartition(".")
        if scheme == "fp8":
            assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
        elif f"{head}.weight_scale" in theirs:
            renamed = {"weight": "weight_packed", "weight_scale_2": "weight_global_scale"}
            other = ours[f"{head}.{renamed.get(last, last).replace('input_scale', 'input_global_scale')}"]
            if tensor.dim() == 0:
                assert other.tolist() == [np.float32(1) / np.float32(tensor.item())]
            else:
                assert torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)), name
    assert len(ours) == len(theirs)


@pytest.mark.parametrize(("layout", "quant_method"), [("auto", "compressed-tensors"), ("modelopt", "modelopt")])
def test_scales_of_a_kv_cache_alone(tmp_path: Path, layout: str, quant_method: str) -> None:
    """vLLM reads them as compressed-tensors, whose linears are all named as left alone."""
    model = small_model(LLAMA)
    folder = write_torch_dist(tmp_path / "iter_0000010", model.tensors, args=model.args)
    options = HuggingFaceOptions(quantization_format=layout)
    export_quantized(folder, tmp_path / "out", options, kv_cache="fp8", kv_cache_scale=0.25)
    config: Any = config_of(tmp_path / "out")["quantization_config"]
    tensors = tensors_of(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn." + ("k_scale" if quant_method != "modelopt" else "k_proj.k_scale")
    assert config["quant_method"] == quant_method and tensors[name].item() == 0.25
    linears = {key.removesuffix(".weight") for key in tensors if key.endswith("_proj.weight")}
    assert set(config["ignore"]) - {"model.embed_tokens"} == linears | {"lm_head"}
    if quant_method == "modelopt":
        assert config["quant_algo"] is None
        assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] is None
