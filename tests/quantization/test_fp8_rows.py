"""FP8 with a scale per row and activations scaled while serving: of any checkpoint, without calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exports import config_of, export, tensors_of
from support.quantizable import Quantizable, export_quantized, fp8_codes, llama, mixtral, same
from support.quantizer_states import properties
from support.small_models import GPT, small_model
from support.torch_dist import megatron_chunks

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.convert.scale_table import ScaleTable
from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions

ROWS = {"algorithm": "fp8_per_channel"}
MIDDLE = ("decoder.layers.*.self_attention.*", "decoder.layers.0.*", "decoder.layers.3.*")


def row_scales(weight: torch.Tensor) -> torch.Tensor:
    amax = weight.float().abs().amax(1)
    return torch.where(amax > 0, amax / 448, 1.0)


def with_an_empty_row() -> Quantizable:
    model = llama()
    model.weight("1.mlp.linear_fc2")[5] = 0
    return model


@pytest.mark.parametrize("training_tp", [1, 2])
def test_every_rank_has_the_scales_of_whole_rows(training_tp: int, tmp_path: Path) -> None:
    model = with_an_empty_row()
    checkpoint = model.write(tmp_path / "c", chunks=megatron_chunks(tp=training_tp))
    output = export_quantized(checkpoint, tmp_path / "o", TrtllmOptions(tp_size=2), **ROWS)
    for rank in range(2):
        tensors = tensors_of(output / f"rank{rank}.safetensors")
        for layer in range(2):
            head, own = f"transformer.layers.{layer}.", f"{layer}."
            gate, up = model.weight(own + "mlp.linear_fc1").chunk(2)
            for name, weight in (("mlp.fc", gate.chunk(2)[rank]), ("mlp.gate", up.chunk(2)[rank])):
                assert same(tensors[f"{head}{name}.per_channel_scale"], row_scales(weight))
                assert same(tensors[f"{head}{name}.weight"], fp8_codes(weight, row_scales(weight)[:, None]))
            for name, source in (("attention.dense", "self_attention.linear_proj"), ("mlp.proj", "mlp.linear_fc2")):
                whole = model.weight(own + source)
                assert same(tensors[f"{head}{name}.per_channel_scale"], row_scales(whole))
                codes = fp8_codes(whole, row_scales(whole)[:, None]).view(torch.uint8).chunk(2, 1)[rank]
                assert same(tensors[f"{head}{name}.weight"].view(torch.uint8), codes)
    table = config_of(output)["quantization"]
    assert table == {
        "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head", "*ln_f", "*ln_embed"],
    }


def test_repeated_heads_have_repeated_scales(tmp_path: Path) -> None:
    """Two key/value heads on four ranks."""
    model = llama()
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o", TrtllmOptions(tp_size=4), **ROWS)
    groups = model.weight("0.self_attention.linear_qkv").reshape(2, 4, 16, 64)  # query, query, key, value
    for rank in range(4):
        own, head = groups[rank // 2], "transformer.layers.0.attention.qkv."
        rows = torch.cat([own[rank % 2], own[2], own[3]])
        tensors = tensors_of(output / f"rank{rank}.safetensors")
        assert same(tensors[f"{head}per_channel_scale"], row_scales(rows))
        assert same(tensors[f"{head}weight"], fp8_codes(rows, row_scales(rows)[:, None]))


def test_measured_scales_equal_calibrated_ones(tmp_path: Path) -> None:
    """ModelOpt's amax of rows is that of the weights."""
    model = llama()
    measured = export_quantized(model.write(tmp_path / "a"), tmp_path / "measured", HuggingFaceOptions(), **ROWS)
    tokens = {-1: None, "type": "dynamic"}
    for name in model.linears:
        inputs = properties((4, 3), block_sizes=tokens, buffers=())
        model.modelopt(name, weight_quantizer=properties((4, 3), axis=0), input_quantizer=inputs)
        model.amax(name, "weight_quantizer", model.weight(name).abs().amax(1, keepdim=True))
    stored = export_quantized(model.write(tmp_path / "b"), tmp_path / "stored", HuggingFaceOptions())
    one, other = (tensors_of(folder / "model.safetensors") for folder in (measured, stored))
    assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    assert one["model.layers.0.self_attn.k_proj.weight_scale"].shape == (32,)


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    """Each process measures its share of the weights."""
    checkpoint = with_an_empty_row().write(tmp_path / "c")
    alone = export_quantized(checkpoint, tmp_path / "alone", TrtllmOptions(tp_size=2), **ROWS)
    options = ("--tp", 2, "--quantization", "fp8_per_channel", "--num-processes", 3)
    together = export(checkpoint, tmp_path / "together", *options)
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        assert (alone / name).read_bytes() == (together / name).read_bytes()


def test_rows_survive_in_the_journal() -> None:
    module = ModuleName("decoder.layers.{layer}.mlp.linear_fc2", 3)
    rows = {"amax of rows of x": np.array([0.1, 3e-38, 7], np.float32)}
    table = ScaleTable({module: np.float32(0.1)}, {}, {module: 0.3}, {module: 0.7}, rows)
    found = ScaleTable.decode(table.encode())
    assert (found.weights, found.input_scales, found.weight_scales) == (table.weights, {module: 0.3}, {module: 0.7})
    assert np.array_equal(found.rows["amax of rows of x"], rows["amax of rows of x"])


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    model = llama()
    model.weight("1.mlp.linear_fc2")[3, 4] = torch.nan
    with pytest.raises(ExportError, match=r"decoder.layers.1.mlp.linear_fc2: amax of its weight is nan"):
        export_quantized(model.write(tmp_path / "c"), tmp_path / "o", **ROWS)


def test_release_0_14_has_it_in_the_middle_layers_mlps_only(tmp_path: Path) -> None:
    checkpoint = llama(4).write(tmp_path / "c")
    old = TrtllmOptions(release="0.14")
    with pytest.raises(ExportError, match=r"layers that are neither first nor last.*--exclude 'decoder.layers.3"):
        export_quantized(checkpoint, tmp_path / "o", old, **ROWS)
    output = export_quantized(checkpoint, tmp_path / "o", old, **ROWS, exclude=MIDDLE)
    assert config_of(output)["quantization"] == {
        "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
        "kv_cache_quant_algo": None,
        "clamp_val": [-1200.0, 1200.0],
    }
    tensors = tensors_of(output / "rank0.safetensors")
    kinds = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    names = ("fc", "gate", "proj")
    assert kinds == {f"transformer.layers.{layer}.mlp.{name}.weight" for layer in (1, 2) for name in names}
    with pytest.raises(ExportError, match=r"FP8_PER_CHANNEL_PER_TOKEN is in TensorRT-LLM 0.14 to 1.2, not in 0.13"):
        export_quantized(checkpoint, tmp_path / "p", TrtllmOptions(release="0.13"), **ROWS, exclude=MIDDLE)


def test_later_releases_are_told_that_recipe(tmp_path: Path) -> None:
    checkpoint = llama(4).write(tmp_path / "c")
    output = export_quantized(checkpoint, tmp_path / "o", TrtllmOptions(pp_size=2), **ROWS, exclude=MIDDLE)
    table = config_of(output)["quantization"]
    assert table["use_meta_recipe"] is True and "exclude_modules" not in table  # type: ignore[operator,index]


def test_whole_blocks_only(tmp_path: Path) -> None:
    checkpoint = llama(4).write(tmp_path / "c")
    with pytest.raises(ExportError, match=r"layers.0.attention: all linears of an attention or an MLP"):
        export_quantized(checkpoint, tmp_path / "o", **ROWS, exclude=("*linear_proj",))
    output = export_quantized(checkpoint, tmp_path / "o", **ROWS, exclude=("decoder.layers.1.mlp.*",))
    layer = "transformer.layers.1."
    expected = ["lm_head", "*ln_f", "*ln_embed", f"{layer}mlp", f"{layer}post_layernorm"]
    assert config_of(output)["quantization"]["exclude_modules"] == expected  # type: ignore[index]


def test_models_that_engines_do_not_have_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"a model with experts in FP8_PER_CHANNEL_PER_TOKEN|experts in FP8_PER"):
        export_quantized(mixtral().write(tmp_path / "a"), tmp_path / "o", **ROWS)
    model = small_model(GPT, hidden_size=64, ffn_hidden_size=128, kv_channels=16)
    checkpoint = Quantizable(model.args, model.per_layer()).write(tmp_path / "b")
    options: Any = {**ROWS}
    with pytest.raises(ExportError, match=r"LayerNorm is in TensorRT-LLM from 1.0 on"):
        export_quantized(checkpoint, tmp_path / "o", TrtllmOptions(release="0.17"), **options)
    export_quantized(checkpoint, tmp_path / "o", TrtllmOptions(release="1.0"), **options)


def test_stored_amax_of_gate_and_up_that_lie_apart(tmp_path: Path) -> None:
    """``weight_w`` and ``weight_v`` of fsdp_dtensor and of ``singleton_local_shards``: the quantiser has one amax for
    the rows of both, gate first."""
    model = llama()
    for name in model.linears:
        inputs = properties((4, 3), block_sizes={-1: None, "type": "dynamic"}, buffers=())
        model.modelopt(name, weight_quantizer=properties((4, 3), axis=0), input_quantizer=inputs)
        model.amax(name, "weight_quantizer", model.weight(name).float().abs().amax(1, keepdim=True))
    whole = tensors_of(export_quantized(model.write(tmp_path / "a"), tmp_path / "whole") / "rank0.safetensors")
    for name in [each for each in model.tensors if each.endswith("linear_fc1.weight")]:
        for half, rows in zip("wv", model.tensors.pop(name).chunk(2), strict=True):
            model.tensors[f"{name}_{half}"] = rows.clone()
    apart = tensors_of(export_quantized(model.write(tmp_path / "b"), tmp_path / "apart") / "rank0.safetensors")
    assert apart.keys() == whole.keys() and all(same(apart[name], whole[name]) for name in whole)
    gate = model.tensors["decoder.layers.0.mlp.linear_fc1.weight_w"]
    assert same(apart["transformer.layers.0.mlp.fc.per_channel_scale"], row_scales(gate))
