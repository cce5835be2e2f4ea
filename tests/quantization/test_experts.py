"""Experts that calibration never saw, and schemes asked of a plain checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.exports import tensors_of
from support.quantizable import E2M1, E4M3, Quantizable, export_quantized, fp8_codes, llama, mixtral, same
from support.quantizer_states import properties

from dist_export.convert import scale_table
from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions

BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": E4M3}


def amax_of_inputs(name: str) -> float | None:
    """Expert 1 was never called and has none, expert 2 has 0."""
    if ".experts." not in name:
        return 2.5
    return {0: 3.0, 1: None, 2: 0.0, 3: 4.0}[int(name.split(".")[4])]


def test_experts_without_tokens_share_the_others_scale(tmp_path: Path) -> None:
    """ModelOpt writes 1.0 for them, which then is the largest of all."""
    checkpoint = mixtral().fp8(amax_of_inputs).write(tmp_path / "c")
    output = export_quantized(checkpoint, tmp_path / "o")
    found = tensors_of(output / "rank0.safetensors")["transformer.layers.1.mlp.proj.activation_scaling_factor"]
    assert same(found, torch.tensor([4.0]) / 448)
    hf = tensors_of(export_quantized(checkpoint, tmp_path / "hf", HuggingFaceOptions()) / "model.safetensors")
    for expert, amax in enumerate((3.0, 4.0, 4.0, 4.0)):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.input_scale"
        assert same(hf[name], torch.tensor(amax) / 448)


def test_no_expert_of_a_layer_was_called(tmp_path: Path) -> None:
    checkpoint = mixtral().fp8(lambda name: None if "1.mlp.experts" in name else 2.5).write(tmp_path / "c")
    with pytest.raises(ExportError, match=r"activations without a scale: 8 faults") as caught:
        export_quantized(checkpoint, tmp_path / "o")
    assert "decoder.layers.1.mlp.experts.experts.3.linear_fc2: FP8 needs an amax of its input" in str(caught.value)


@pytest.mark.parametrize("row", [0, 40, -1])
def test_weights_that_calibration_never_saw_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    """A stored amax of 0 says nothing of weights that are not. They are read some rows at a time."""
    monkeypatch.setattr(scale_table, "MEASURE_BYTES", 4096)
    model = mixtral().fp8(lambda name: 2.5)
    name = "0.mlp.experts.experts.2.linear_fc2"
    model.weight(name)[row, 3] = -7.0
    model.amax(name, "weight_quantizer", 0.0)
    tensors = tensors_of(export_quantized(model.write(tmp_path / "c"), tmp_path / "o") / "rank0.safetensors")
    scale = model.weight(name).float().abs().max().reshape(1) / 448
    assert same(tensors["transformer.layers.0.mlp.proj.weights_scaling_factor"][2], scale)
    assert same(tensors["transformer.layers.0.mlp.proj.weight"][2], fp8_codes(model.weight(name), scale))


def test_all_ranks_have_one_input_scale_for_the_experts_of_a_layer(tmp_path: Path) -> None:
    """The largest of all experts, those of other ranks too: every rank quantises all tokens before it chooses."""
    amax = {f"{layer}.mlp.experts.experts.{n}.linear_fc{fc}": 1.0 + n + 4 * fc + 10 * layer
            for layer in (0, 1) for n in range(4) for fc in (1, 2)}  # fmt: skip
    model = mixtral().fp8(lambda name: amax.get(name, 2.5))
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o", TrtllmOptions(tp_size=2, moe_ep_size=2))
    for rank, layer, (linear, fc) in itertools.product((0, 1), (0, 1), (("fc", 1), ("proj", 2))):
        written = tensors_of(output / f"rank{rank}.safetensors")
        scale = written[f"transformer.layers.{layer}.mlp.{linear}.activation_scaling_factor"]
        assert same(scale, torch.tensor([4.0 + 4 * fc + 10 * layer]) / 448)


def fp4(model: Quantizable, *, inputs: bool, factor: bool = False) -> Quantizable:
    quantizer = properties(E2M1, block_sizes=BLOCKS)
    buffers = ("_amax", "_pre_quant_scale") if factor else ("_amax",)
    own = properties(E2M1, block_sizes=BLOCKS, disabled=not inputs, buffers=buffers)
    for name in model.linears:
        model.modelopt(name, weight_quantizer=quantizer, input_quantizer=own)
        model.amax(name, "weight_quantizer", model.weight(name).abs().max().reshape(1))
        if inputs:
            model.amax(name, "input_quantizer", 3.5)
        if factor:
            ones = torch.ones(model.weight(name).shape[1], dtype=torch.bfloat16)
            model.amax(name, "input_quantizer", ones, quantity="_pre_quant_scale")
    return model


def test_fp4_that_is_asked_for_equals_what_modelopt_calibrates(tmp_path: Path) -> None:
    """The amax of weights is measured, that of inputs comes from a file."""
    plain = llama()
    amax = {f"decoder.layers.{name}.input_quantizer._amax": torch.tensor(3.5) for name in plain.linears}
    save_file(amax, tmp_path / "amax.safetensors")
    asked = export_quantized(
        plain.write(tmp_path / "a"), tmp_path / "asked", calibration=tmp_path / "amax.safetensors", algorithm="nvfp4"
    )
    calibrated = export_quantized(fp4(llama(), inputs=True).write(tmp_path / "b"), tmp_path / "calibrated")
    one, other = (tensors_of(folder / "rank0.safetensors") for folder in (asked, calibrated))
    assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    with pytest.raises(ExportError, match=r"nvfp4 needs the amax of every linear's input.*--calibration"):
        export_quantized(tmp_path / "a" / "iter_0000010", tmp_path / "o", algorithm="nvfp4")


def test_fp4_weights_alone(tmp_path: Path) -> None:
    """As FP4, without scales of activations; no engine has it."""
    checkpoint = fp4(llama(), inputs=False).write(tmp_path / "a")
    hf = tensors_of(export_quantized(checkpoint, tmp_path / "o", HuggingFaceOptions()) / "model.safetensors")
    both = fp4(llama(), inputs=True).write(tmp_path / "b")
    expected = tensors_of(export_quantized(both, tmp_path / "p", HuggingFaceOptions()) / "model.safetensors")
    expected = {name: tensor for name, tensor in expected.items() if not name.endswith("input_scale")}
    assert hf.keys() == expected.keys() and all(same(hf[name], expected[name]) for name in hf)
    with pytest.raises(ExportError, match=r"engine builder has no W4A16_NVFP4: export the model with --target hf"):
        export_quantized(checkpoint, tmp_path / "q")


def test_fp4_with_factors_is_of_no_engine(tmp_path: Path) -> None:
    checkpoint = fp4(llama(), inputs=True, factor=True).write(tmp_path / "c")
    with pytest.raises(ExportError, match=r"engine builder has no NVFP4_AWQ"):
        export_quantized(checkpoint, tmp_path / "o")
