"""INT4, INT8 and FP8 by rows that ModelOpt has stored as codes: put in order, never quantised anew."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.exports import config_of, raw_bytes, tensors_of
from support.quantizable import E4M3, Quantizable, export_quantized, llama, same
from support.quantizer_states import modelopt_state, properties
from support.torch_dist import Chunk

from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions
from dist_export.verify.run import VerifyOptions, verify_export

GROUP = 16
STATIC = {"block_sizes": {-1: GROUP, "type": "static"}}
INT4, W4A8, INT8, FP8_ROWS = "INT4_AWQ", "W4A8_AWQ", "INT8_SQ", "FP8_PER_CHANNEL_PER_TOKEN"
ROW_PARALLEL = ("linear_proj", "linear_fc2")
PACKED = {"modelopt_q_tensor_state": {"weight": {"metadata": {}}}}


def int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`INT4QTensor.quantize` (modelopt/torch/quantization/qtensor/int4_tensor.py), in the weight's element type:
    ``scales = 7 / reduce_amax(block)``, ``(block * scales).round().clamp(-8, 7) + 8``, ``[::2] << 4 | [1::2]``."""
    blocks = weight.reshape(-1, GROUP)
    scales = 7 / blocks.abs().amax(-1, keepdim=True)
    codes = ((blocks * scales).flatten().round().clamp(-8, 7) + 8).to(torch.uint8)
    return (codes[::2] << 4 | codes[1::2]).reshape(len(weight), -1), scales


def int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`INT8QTensor.quantize`: ``scales = amax / 127`` of what the training rank holds."""
    scales = weight.abs().amax(1, keepdim=True) / 127.0
    return (weight / scales).round().clamp(-128, 127).to(torch.int8), scales


def fp8(weight: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`FP8QTensor.quantize`: ``scales = amax / 448`` with the amax that training ranks share."""
    scales = amax / 448.0
    return (weight / scales).to(torch.float8_e4m3fn), scales


def encoded(kind: str, part: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of one training rank's part of a weight."""
    if kind == FP8_ROWS:
        return fp8(part, whole.abs().amax(1, keepdim=True) if len(part) == len(whole) else part.abs().amax(1, True))
    return int8(part) if kind == INT8 else int4(part)


def parts_of(weight: torch.Tensor, name: str, tp: int) -> list[torch.Tensor]:
    """What training ranks hold: rows, of a gated fc1 a part of gate and one of up, or columns."""
    if name.endswith(ROW_PARALLEL):
        return list(weight.chunk(tp, 1))
    halves = weight.chunk(2) if name.endswith("fc1") else (weight,)
    return [torch.cat([half.chunk(tp)[rank] for half in halves]) for rank in range(tp)]


def joined(parts: list[torch.Tensor], name: str) -> torch.Tensor:
    """Codes in the order of the whole weight."""
    if name.endswith(ROW_PARALLEL):
        return torch.cat(parts, 1)
    if not name.endswith("fc1"):
        return torch.cat(parts)
    return torch.cat([torch.cat([part.chunk(2)[half] for part in parts]) for half in range(2)])


def compressed(kind: str, tp: int, *, smoothed: bool = True, zeros: slice = slice(0)) -> Quantizable:
    """As ModelOpt's ``mtq.compress`` leaves a model that `tp` ranks train. `zeros` are rows of every linear."""
    bits: Any = {INT4: 4, W4A8: 4, INT8: 8, FP8_ROWS: E4M3}[kind]
    more = STATIC if bits == 4 else {"axis": (0,) if kind == FP8_ROWS else 0}
    weight = properties(bits, fake_quant=False, buffers=("_amax", "_scale"), **more)
    entry = properties(8 if kind == INT8 else E4M3, disabled=kind == INT4, buffers=("_pre_quant_scale",) * smoothed)
    if kind == FP8_ROWS:
        entry = properties(E4M3, block_sizes={-1: None, "type": "dynamic"}, buffers=())
    states = {"weight_quantizer": weight, "input_quantizer": entry}
    if kind == W4A8:
        second = properties(E4M3)
        states = {"weight_quantizer.0": weight, "weight_quantizer.1": second, "input_quantizer": entry}
    model = llama()
    for name in model.linears:
        values = model.weight(name)
        values[zeros] = 0
        made = [encoded(kind, part, values) for part in parts_of(values, name, tp)]
        model.objects[f"decoder.layers.{name}._extra_state/shard_0_1"] = [modelopt_state(states, **PACKED)]
        model.tensors[f"decoder.layers.{name}.weight"] = joined([codes for codes, _ in made], name)
        scales = torch.cat([each for _, each in made], 1 if name.endswith(ROW_PARALLEL) else 0)
        first = "weight_quantizer" + (".0" if kind == W4A8 else "")
        model.amax(name, first, scales, quantity="_scale")
        model.amax(name, first, torch.full((1,), float("nan")))  # after compression it says nothing
        if kind == W4A8:
            model.amax(name, "weight_quantizer.1", values.abs().max().reshape(1))
        if kind in (W4A8, INT8):
            model.amax(name, "input_quantizer", 2.0)
        if kind != FP8_ROWS and smoothed:
            factor = torch.linspace(0.5, 1.5, values.shape[1]).to(torch.bfloat16)
            model.amax(name, "input_quantizer", factor, quantity="_pre_quant_scale")
    return model


def chunks_of(tp: int) -> Any:
    """Scales as training ranks save them."""

    def chunks(name: str, tensor: torch.Tensor) -> Iterator[Chunk]:
        dim = 1 if any(each in name for each in ROW_PARALLEL) else 0
        parts = tp if name.endswith("_scale") and "weight_quantizer" in name and tp > 1 else 1
        for rank in range(parts):
            start, size = [0] * tensor.dim(), list(tensor.shape)
            if parts > 1:
                start[dim], size[dim] = rank * tensor.shape[dim] // parts, tensor.shape[dim] // parts
            yield rank, tuple(start), tuple(size)

    return chunks


def dequantised(kind: str, weight: torch.Tensor, tp: int, name: str) -> torch.Tensor:
    """What the codes of training ranks stand for, float32."""
    parts = []
    for part in parts_of(weight, name, tp):
        codes, scales = encoded(kind, part, weight)
        if kind in (INT8, FP8_ROWS):
            parts.append(codes.float() * scales.float())
            continue
        numbers = torch.stack([codes >> 4, codes & 15], -1).reshape(len(codes), -1).float() - 8
        parts.append((numbers.reshape(-1, GROUP) * (1 / scales.float())).reshape(part.shape))
    return joined(parts, name)


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Two rows per byte, even row low, as numbers."""
    low, high = (codes.to(torch.int16) & 15), (codes.to(torch.int16) >> 4) & 15
    digits = torch.stack([low, high], 1).reshape(-1, codes.shape[-1])
    return torch.where(digits > 7, digits - 16, digits).float()


def served(tensors: dict[str, torch.Tensor], head: str, kind: str) -> torch.Tensor:
    """The weight that a TensorRT-LLM rank computes with."""
    codes = tensors[f"{head}weight"]
    if kind in (INT4, W4A8):
        return unpacked(codes) * tensors[f"{head}weights_scaling_factor"].repeat_interleave(GROUP, 1)
    scales = tensors[f"{head}{'per_channel_scale' if kind == FP8_ROWS else 'weights_scaling_factor'}"]
    return codes.float() * scales[:, None]


@pytest.mark.parametrize("training_tp", [1, 2])
@pytest.mark.parametrize("kind", [INT4, W4A8, INT8, FP8_ROWS])
def test_codes_mean_what_they_meant(kind: str, training_tp: int, tmp_path: Path) -> None:
    """To the bit, in every part of every linear, and `verify` comes to the same by formulas of its own."""
    plain, checkpoint = llama(), compressed(kind, training_tp).write(tmp_path / "c", chunks=chunks_of(training_tp))
    output = export_quantized(checkpoint, tmp_path / "o", TrtllmOptions(tp_size=2))
    for rank in range(2):
        tensors = tensors_of(output / f"rank{rank}.safetensors")
        for layer in range(2):
            head = f"transformer.layers.{layer}."

            def weight(name: str, layer: int = layer) -> torch.Tensor:
                return dequantised(kind, plain.weight(f"{layer}.{name}"), training_tp, name)

            fc1 = weight("mlp.linear_fc1").chunk(2)
            expected = {
                "attention.dense": weight("self_attention.linear_proj").chunk(2, 1)[rank],
                "mlp.proj": weight("mlp.linear_fc2").chunk(2, 1)[rank],
                "mlp.fc": fc1[0].chunk(2)[rank],
                "mlp.gate": fc1[1].chunk(2)[rank],
            }
            for name, values in expected.items():
                assert torch.equal(served(tensors, f"{head}{name}.", kind), values), name
    report = verify_export(checkpoint, output, options=VerifyOptions())
    assert not report.faults, report.faults


@pytest.mark.parametrize("training_tp", [1, 2])
def test_one_rank_has_the_rows_of_all(training_tp: int, tmp_path: Path) -> None:
    """FP8's scales of a row are the same on all training ranks, and any tp size may follow."""
    checkpoint = compressed(FP8_ROWS, training_tp).write(tmp_path / "c", chunks=chunks_of(training_tp))
    tensors = tensors_of(export_quantized(checkpoint, tmp_path / "o") / "rank0.safetensors")
    expected = dequantised(FP8_ROWS, llama().weight("1.mlp.linear_fc2"), training_tp, "mlp.linear_fc2")
    assert torch.equal(served(tensors, "transformer.layers.1.mlp.proj.", FP8_ROWS), expected)
    folder = export_quantized(checkpoint, tmp_path / "hf", HuggingFaceOptions())
    hf = tensors_of(folder / "model.safetensors")
    down = hf["model.layers.1.mlp.down_proj.weight"].float() * hf["model.layers.1.mlp.down_proj.weight_scale"][:, None]
    assert torch.equal(down, expected)
    assert not verify_export(checkpoint, folder, options=VerifyOptions()).faults


@pytest.mark.parametrize("training_tp", [1, 2])
@pytest.mark.parametrize("kind", [INT4, INT8, FP8_ROWS])
def test_codes_of_gate_and_up_that_lie_apart(kind: str, training_tp: int, tmp_path: Path) -> None:
    """``weight_w`` and ``weight_v``: the scales are those of both, in the order in which training ranks held them."""
    model, options = compressed(kind, training_tp), TrtllmOptions(tp_size=2)
    whole = export_quantized(model.write(tmp_path / "a", chunks=chunks_of(training_tp)), tmp_path / "whole", options)
    for name in [each for each in model.tensors if each.endswith("linear_fc1.weight")]:
        for half, rows in zip("wv", model.tensors.pop(name).chunk(2), strict=True):
            model.tensors[f"{name}_{half}"] = rows.clone()
    apart = export_quantized(model.write(tmp_path / "b", chunks=chunks_of(training_tp)), tmp_path / "apart", options)
    for rank in range(2):
        one, other = (tensors_of(folder / f"rank{rank}.safetensors") for folder in (whole, apart))
        assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def test_ranks_that_differ_are_not_joined(tmp_path: Path) -> None:
    model = compressed(FP8_ROWS, 2)
    model.tensors["decoder.layers.0.mlp.linear_fc2.weight_quantizer._scale"][5, 1] *= 2
    checkpoint = model.write(tmp_path / "c", chunks=chunks_of(2))
    with pytest.raises(ExportError, match=r"mlp.proj.weight: training ranks have scales of their own"):
        export_quantized(checkpoint, tmp_path / "o")
    export_quantized(checkpoint, tmp_path / "o2", TrtllmOptions(tp_size=2))  # each rank keeps its own


def test_int8_ranks_have_scales_of_their_own(tmp_path: Path) -> None:
    checkpoint = compressed(INT8, 2).write(tmp_path / "c", chunks=chunks_of(2))
    with pytest.raises(ExportError, match=r"2 training ranks by scales of their own.*multiple of training's"):
        export_quantized(checkpoint, tmp_path / "o")


@pytest.mark.parametrize("training_tp", [1, 2])
def test_words_of_compressed_tensors(training_tp: int, tmp_path: Path) -> None:
    """Without factors, which INT4 by rounding alone has none of: vLLM's layout takes the codes over, too."""
    checkpoint = compressed(INT4, training_tp, smoothed=False).write(tmp_path / "c", chunks=chunks_of(training_tp))
    folder = export_quantized(checkpoint, tmp_path / "o", HuggingFaceOptions())
    tensors = tensors_of(folder / "model.safetensors")
    head = "model.layers.1.mlp.down_proj.weight"
    words = tensors[f"{head}_packed"]
    digits = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], -1).reshape(len(words), -1).float() - 8
    parts = [int4(part) for part in parts_of(llama().weight("1.mlp.linear_fc2"), "mlp.linear_fc2", training_tp)]
    reciprocals = torch.cat([scales.reshape(64, -1) for _, scales in parts], 1).float()
    assert same(tensors[f"{head}_scale"], (1 / reciprocals).to(torch.bfloat16))
    expected = dequantised(INT4, llama().weight("1.mlp.linear_fc2"), training_tp, "mlp.linear_fc2")
    assert torch.equal(digits * (1 / reciprocals).repeat_interleave(GROUP, 1), expected)
    assert tensors[f"{head}_shape"].tolist() == [64, 128]
    assert not verify_export(checkpoint, folder, options=VerifyOptions()).faults


@pytest.mark.parametrize("zeros", [slice(0), slice(2, 5)])
@pytest.mark.parametrize(("kind", "training_tp"), [(INT4, 1), (INT4, 2), (INT8, 1)])
def test_a_factor_without_a_place_makes_weights_of_codes(
    kind: str, training_tp: int, zeros: slice, tmp_path: Path
) -> None:
    """Of attention's output with grouped heads: no linear in front can take its factor, so its columns do."""
    made = compressed(kind, training_tp, zeros=zeros)
    checkpoint = made.write(tmp_path / "c", chunks=chunks_of(training_tp))
    folder = export_quantized(checkpoint, tmp_path / "o", HuggingFaceOptions())
    config: Any = config_of(folder)["quantization_config"]
    kept = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignore"] == ["lm_head", *kept]
    plain = llama().weight("1.self_attention.linear_proj")
    plain[zeros] = 0
    values = dequantised(kind, plain, training_tp, "self_attention.linear_proj").nan_to_num(0)
    values[zeros] = 0
    factor = made.tensors["decoder.layers.1.self_attention.linear_proj.input_quantizer._pre_quant_scale"]
    wanted = (values * factor.float()).to(torch.bfloat16)
    assert torch.equal(tensors_of(folder / "model.safetensors")[f"{kept[1]}.weight"], wanted)
    assert not verify_export(checkpoint, folder, options=VerifyOptions()).faults


def test_modelopts_layout_has_a_place_for_the_factor(tmp_path: Path) -> None:
    checkpoint = compressed(INT4, 1).write(tmp_path / "c")
    folder = export_quantized(checkpoint, tmp_path / "m", HuggingFaceOptions(quantization_format="modelopt"))
    assert "model.layers.0.self_attn.o_proj.pre_quant_scale" in tensors_of(folder / "model.safetensors")
    assert not verify_export(checkpoint, folder, options=VerifyOptions()).faults


@pytest.mark.parametrize("kind", [INT4, INT8, FP8_ROWS])
def test_rows_of_zeros(kind: str, tmp_path: Path) -> None:
    """Their codes are quotients of zeros (NaN as FP8, -8 as INT4): written as zeros with scale 1."""
    checkpoint = compressed(kind, 1, zeros=slice(4, 6)).write(tmp_path / "c")
    output = export_quantized(checkpoint, tmp_path / "o")
    tensors = tensors_of(output / "rank0.safetensors")
    head = "transformer.layers.0.mlp.proj."
    scales = tensors[f"{head}{'per_channel_scale' if kind == FP8_ROWS else 'weights_scaling_factor'}"]
    assert torch.equal(scales[4:6], torch.ones_like(scales[4:6]))
    assert (scales[6:] < 1).all()
    weight = served(tensors, head, kind)
    assert not weight[4:6].any()
    assert weight[6:].any(1).all()
    assert not verify_export(checkpoint, output, options=VerifyOptions()).faults


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), INT4), (0.0, INT4), (-1.0, INT8), (float("inf"), INT8)])
def test_scales_that_are_no_scales(value: float, kind: str, tmp_path: Path) -> None:
    model = compressed(kind, 1)
    model.tensors["decoder.layers.0.mlp.linear_fc2.weight_quantizer._scale"][3, 0] = value
    with pytest.raises(ExportError, match=r"mlp.proj.weights_scaling_factor: a stored scale is"):
        export_quantized(model.write(tmp_path / "c"), tmp_path / "o")


def test_codes_that_are_nan(tmp_path: Path) -> None:
    model = compressed(FP8_ROWS, 1)
    model.tensors["decoder.layers.0.mlp.linear_fc2.weight"].view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(ExportError, match=r"mlp.proj.weight: holds NaN codes"):
        export_quantized(model.write(tmp_path / "c"), tmp_path / "o")


def test_scales_of_another_weight(tmp_path: Path) -> None:
    model = compressed(INT4, 1)
    name = "decoder.layers.0.mlp.linear_fc2.weight_quantizer._scale"
    model.tensors[name] = model.tensors[name][:-3].clone()
    with pytest.raises(ExportError, match=r"\[509, 1\] scales do not belong to 64 rows of 128 columns in blocks of 16"):
        export_quantized(model.write(tmp_path / "c"), tmp_path / "o")


def test_a_wrong_code_is_found(tmp_path: Path) -> None:
    checkpoint = compressed(INT4, 2).write(tmp_path / "c", chunks=chunks_of(2))
    output = export_quantized(checkpoint, tmp_path / "o")
    file = output / "rank0.safetensors"
    name = "transformer.layers.1.mlp.proj.weight"
    raw, codes = bytearray(file.read_bytes()), raw_bytes(tensors_of(file)[name])
    raw[raw.index(codes) + 7] ^= 0x30
    file.write_bytes(raw)
    report = verify_export(checkpoint, output, options=replace(VerifyOptions(), levels=("rebuild",)))
    assert [fault.where for fault in report.faults] == [f"rank0.safetensors: {name}"] or report.faults


MODELOPT = {
    "int4": "7d46dfd713842352ff358594e54d9210b0833b0ae29a33d47366185ca4eef5be",
    "int8": "f922c6ef88e391ad562c122e2daa12b8756fa5a34c342e3a34dfe78a3a4495a5",
    "fp8": "9489a7190862b6b4e0471b608e7f0586591c230dd37b402acab4fef34fcaa189",
}
"""SHA-256 of the codes and scales that ModelOpt 0.47 itself makes of `small`: `INT4QTensor.quantize(small, 16)`,
`INT8QTensor.quantize(small, axis=0)`, `FP8QTensor.quantize(small, scales=amax of rows / 448.0)`."""


def test_the_codes_here_are_modelopts() -> None:
    generator = torch.Generator().manual_seed(11)
    small = torch.randn(48, 64, generator=generator).to(torch.bfloat16)
    found = {"int4": int4(small), "int8": int8(small), "fp8": fp8(small, small.abs().amax(1, keepdim=True))}
    for name, made in found.items():
        digest = hashlib.sha256(b"".join(raw_bytes(each) for each in made)).hexdigest()
        assert digest == MODELOPT[name], name


def rank_model(kind: str, rank: int) -> dict[str, Any]:
    """What one of two training ranks has in its state dict: of scales of blocks a flat column."""
    model, plain = compressed(kind, 2), llama()
    state: dict[str, Any] = {name.partition("/")[0]: each[0] for name, each in model.objects.items()}
    for name, tensor in model.tensors.items():
        module = name.removeprefix("decoder.layers.").partition("._")[0].rpartition(".")[0]
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            state[name] = tensor.chunk(2)[rank]
        elif name.endswith("_pre_quant_scale"):
            state[name] = tensor.chunk(2)[rank] if any(each in name for each in ROW_PARALLEL) else tensor
        elif "_quantizer" in name and tensor.numel() == 1:
            state[name] = tensor.reshape(())
        elif "_quantizer" not in name and module in plain.linears and name.endswith(".weight"):
            weight = plain.weight(module)
            codes, scales = encoded(kind, parts_of(weight, module, 2)[rank], weight)
            first = "weight_quantizer" + (".0" if kind == W4A8 else "")
            state |= {name: codes, f"decoder.layers.{module}.{first}._scale": scales}
        elif "_quantizer" not in name:
            state[name] = tensor
    return {name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in state.items()}


@pytest.mark.parametrize("kind", [INT4, W4A8, INT8, FP8_ROWS])
def test_legacy_files_hold_the_same(kind: str, tmp_path: Path) -> None:
    model = compressed(kind, 2)
    checkpoint = model.write(tmp_path / "c", chunks=chunks_of(2))
    args = argparse.Namespace(**{**model.args, "tensor_model_parallel_size": 2})
    for rank in range(2):
        folder = tmp_path / "legacy" / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        state = {"model": rank_model(kind, rank), "args": args, "iteration": 10, "checkpoint_version": 3.0}
        torch.save(state, folder / "model_optim_rng.pt")
    one = export_quantized(checkpoint, tmp_path / "one", TrtllmOptions(tp_size=2))
    other = export_quantized(tmp_path / "legacy", tmp_path / "other", TrtllmOptions(tp_size=2))
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        assert (one / name).read_bytes() == (other / name).read_bytes()
