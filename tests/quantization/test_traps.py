"""Fifteen ways in which scales go wrong silently: the files load, and the model talks nonsense. One test each.

The mistakes are those of exporters before this one; what the checkpoints hold is as the releases write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import config_of, tensors_of
from support.quantizable import E4M3, Quantizable, export_quantized, fp8_codes, llama, mixtral, same
from support.quantizer_states import modelopt_state, properties, split_state, te_state
from support.torch_dist import Chunk

from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions

TOKENS = {-1: None, "type": "dynamic"}
BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": E4M3}
FIRST = "transformer.layers.0."


def rank0(output: Path) -> dict[str, torch.Tensor]:
    return tensors_of(output / "rank0.safetensors")


def awq(model: Quantizable, factor: torch.Tensor) -> Quantizable:
    """INT4 in blocks of 128 columns with a factor for every input."""
    blocks, buffers = {-1: 128, "type": "static"}, ("_pre_quant_scale",)
    for name in model.linears:
        inputs = properties(8, disabled=True, buffers=buffers)
        model.modelopt(name, weight_quantizer=properties(4, block_sizes=blocks), input_quantizer=inputs)
        weight = model.weight(name)
        model.amax(name, "weight_quantizer", weight.reshape(len(weight), -1, 128).abs().amax(-1).float())
        model.amax(name, "input_quantizer", factor[: weight.shape[1]].clone(), quantity="_pre_quant_scale")
    return model


def large(**args: Any) -> Quantizable:
    return llama(hidden_size=128, ffn_hidden_size=128, kv_channels=32, **args)


def test_trap_1_amax_of_fc1_in_the_order_of_training_ranks(tmp_path: Path) -> None:
    """gate_0, up_0, gate_1, up_1 where the weight is gate, up: right shape, wrong values, nothing fails."""
    model = llama()
    for name in model.linears:
        inputs = properties(E4M3, block_sizes=TOKENS, buffers=())
        model.modelopt(name, weight_quantizer=properties(E4M3, axis=0), input_quantizer=inputs)
        amax = model.weight(name).abs().amax(1, keepdim=True)
        if name.endswith("fc1"):
            amax = amax.reshape(2, 2, -1, 1).transpose(0, 1).reshape(amax.shape).clone()
        model.amax(name, "weight_quantizer", amax)

    def chunks(name: str, tensor: torch.Tensor) -> Iterator[Chunk]:
        parts = 2 if name.endswith("linear_fc1.weight_quantizer._amax") else 1
        for rank in range(parts):
            start, size = [0] * tensor.dim(), list(tensor.shape)
            start[0], size[0] = rank * len(tensor) // parts, len(tensor) // parts
            yield rank, tuple(start), tuple(size)

    tensors = rank0(export_quantized(model.write(tmp_path / "c", chunks=chunks), tmp_path / "o"))
    for name, half in zip(("fc", "gate"), model.weight("0.mlp.linear_fc1").chunk(2), strict=True):
        scales = half.float().abs().amax(1) / 448
        assert same(tensors[f"{FIRST}mlp.{name}.per_channel_scale"], scales)
        assert same(tensors[f"{FIRST}mlp.{name}.weight"], fp8_codes(half, scales[:, None]))


def test_trap_2_scales_of_other_experts(tmp_path: Path) -> None:
    """Megatron cuts a grouped linear's state as TransformerEngine kept it until 2.2: then 21 is expert 1's input."""
    flat = torch.tensor([40.0, 20.0, 1.0, 50.0, 21.0, 1.0])  # input, weight, output of each expert
    parts = split_state("2.15", flat, torch.stack([0 * flat, 448 / flat]))

    def state(name: str) -> Any:
        if ".experts." in name:
            return parts[int(name.split(".")[4])]
        return te_state("2.15", torch.tensor([30.0, 1.0, 1.0]))

    model = mixtral(num_experts=2, moe_grouped_gemm=True, expert_model_parallel_size=1).te(state)
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o", HuggingFaceOptions(), algorithm="fp8")
    tensors = tensors_of(output / "model.safetensors")
    for expert, scale in enumerate((40.0, 50.0)):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w2.input_scale"
        assert same(tensors[name], 1 / torch.tensor(scale))


def test_trap_3_the_factor_of_activations_is_there_exactly_once(tmp_path: Path) -> None:
    factor = torch.linspace(0.5, 2, 128).to(torch.bfloat16)
    model = awq(large(), factor)
    checkpoint = model.write(tmp_path / "c")
    tensors = rank0(export_quantized(checkpoint, tmp_path / "o"))
    for name in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
        assert same(tensors[f"{FIRST}{name}.prequant_scaling_factor"], factor)
    norm = model.tensors["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"]
    assert same(tensors[f"{FIRST}input_layernorm.weight"], norm)  # not folded as well
    target = HuggingFaceOptions(quantization_format="modelopt")
    hf = tensors_of(export_quantized(checkpoint, tmp_path / "hf", target) / "model.safetensors")
    folded = (norm.float() * factor.float()).to(torch.bfloat16)
    assert same(hf["model.layers.0.input_layernorm.weight"], folded)
    factors = {name.split(".")[-2] for name in hf if name.endswith("pre_quant_scale")}
    assert factors == {"o_proj", "down_proj"}
    with pytest.raises(ExportError, match="the weights are stored smoothed or quantised"):
        export_quantized(checkpoint, tmp_path / "p", algorithm="none")


def test_trap_4_a_history_of_zeros(tmp_path: Path) -> None:
    """Megatron's default history has one entry, which is 0 after each step. An amax of 0 would give no scale, or 1."""
    checkpoint = llama().te(lambda name: te_state("2.1", torch.tensor([64.0, 1.0, 1.0]), torch.zeros(1, 3)))
    tensors = rank0(export_quantized(checkpoint.write(tmp_path / "c"), tmp_path / "o", algorithm="fp8"))
    assert tensors[f"{FIRST}mlp.fc.activation_scaling_factor"].item() == 1 / 64


def test_trap_5_compressed_int4_looks_like_awq(tmp_path: Path) -> None:
    """Its scales are reciprocals, its codes have 8 added, and two columns share a byte: put in order, not passed on.

    All kinds of codes and training ranks: test_stored_codes.py.
    """
    model = awq(large(), torch.ones(128, dtype=torch.bfloat16))
    for name in model.linears:
        weight, key = model.weight(name), f"decoder.layers.{name}.weight_quantizer."
        model.tensors[f"{key}_scale"] = torch.full((len(weight), 1), 4.0, dtype=torch.bfloat16)  # 7 / amax: 1/4
        packed = torch.full((len(weight), 64), 0x9F, dtype=torch.uint8)  # 1 in even columns, 7 in odd ones
        model.tensors[f"decoder.layers.{name}.weight"] = packed
        blocks, buffers = {-1: 128, "type": "static"}, ("_amax", "_scale")
        quantizer = properties(4, block_sizes=blocks, fake_quant=False, buffers=buffers)
        state = modelopt_state({"weight_quantizer": quantizer}, modelopt_q_tensor_state={"weight": {}})
        model.objects[f"decoder.layers.{name}._extra_state/shard_0_1"] = [state]
    tensors = tensors_of(export_quantized(model.write(tmp_path / "c"), tmp_path / "o") / "rank0.safetensors")
    codes, head = tensors["transformer.layers.0.attention.dense.weight"], "transformer.layers.0.attention.dense."
    assert codes[:, 0::2].eq(0x11).all()
    assert codes[:, 1::2].eq(0x77).all()
    assert tensors[f"{head}weights_scaling_factor"].eq(0.25).all()


def test_trap_6_the_norms_own_quantiser(tmp_path: Path) -> None:
    """linear_qkv.layer_norm_input_quantizer._amax ends like the name of the linear's input amax."""
    model = llama().fp8(lambda name: 2.5)
    for layer in range(2):
        for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            model.amax(f"{layer}.{name}", "layer_norm_input_quantizer", 400.0)
    model.tensors["decoder.final_layernorm.input_quantizer._amax"] = torch.tensor(400.0)
    tensors = rank0(export_quantized(model.write(tmp_path / "c"), tmp_path / "o"))
    scales = {tensors[name].item() for name in tensors if name.endswith("activation_scaling_factor")}
    assert scales == {float(torch.tensor(2.5) / 448)}


def test_trap_7_scales_point_in_two_directions(tmp_path: Path) -> None:
    """What training keeps multiplies before the cast, what files hold multiplies after it."""
    trained = llama().te(lambda name: te_state("2.1", torch.tensor([8.0, 4.0, 1.0])))
    calibrated = llama().fp8(lambda name: 448 / 8)
    one, other = (
        rank0(export_quantized(model.write(tmp_path / name), tmp_path / f"{name}o", algorithm=algorithm))
        for name, model, algorithm in (("a", trained, "fp8"), ("b", calibrated, "auto"))
    )
    assert one[f"{FIRST}mlp.proj.activation_scaling_factor"].item() == 0.125
    assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def test_trap_8_one_global_scale_in_a_fused_group_of_fp4(tmp_path: Path) -> None:
    """vLLM takes the largest silently, TensorRT-LLM asserts: block scales are made for the one that is shared."""
    model, quantizer = llama(), properties((2, 1), block_sizes=BLOCKS)
    for name in model.linears:
        model.modelopt(name, weight_quantizer=quantizer, input_quantizer=quantizer)
        model.amax(name, "weight_quantizer", model.weight(name).abs().max().reshape(1))
        model.amax(name, "input_quantizer", 3.0)
    hf = export_quantized(model.write(tmp_path / "c"), tmp_path / "o", HuggingFaceOptions())
    tensors = tensors_of(hf / "model.safetensors")
    for head, parts in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        names = [f"model.layers.0.{head}.{part}_proj" for part in parts]
        for last in ("weight_scale_2", "input_scale"):
            assert len({tensors[f"{name}.{last}"].item() for name in names}) == 1
    scale_2 = model.weight("0.mlp.linear_fc1").float().abs().max() / 2688
    up = model.weight("0.mlp.linear_fc1")[128:].float()
    blocks = up.reshape(len(up), -1, 16).abs().amax(-1) / (6 * scale_2)
    expected = blocks.clamp(2**-9, 448).to(torch.float8_e4m3fn)
    assert same(tensors["model.layers.0.mlp.up_proj.weight_scale"], expected)


def test_trap_9_codes_and_scale_of_gate_and_up_belong_together(tmp_path: Path) -> None:
    """A gate quantised with its own amax beside the scale of both would be wrong by their ratio."""
    model = llama().fp8(lambda name: 2.5)
    checkpoint = model.write(tmp_path / "c")
    tensors = rank0(export_quantized(checkpoint, tmp_path / "o"))
    gate, up = model.weight("0.mlp.linear_fc1").chunk(2)
    assert gate.abs().max() > 1.5 * up.abs().max()
    for name, half in (("fc", gate), ("gate", up)):
        head = f"{FIRST}mlp.{name}."
        restored = tensors[f"{head}weight"].float() * tensors[f"{head}weights_scaling_factor"]
        assert (restored - half.float()).abs().max() < half.abs().max() / 16


@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling"])
def test_trap_10_no_scale_is_invented(recipe: str, tmp_path: Path) -> None:
    checkpoint = llama().te(lambda name: te_state("2.10", None, recipe=recipe)).write(tmp_path / "c")
    with pytest.raises(ExportError, match="FP8 needs a scale of every linear's input: 8 faults"):
        export_quantized(checkpoint, tmp_path / "o", algorithm="fp8")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("scheme", "expected"), [("fp8", 1.0), ("int8", 0.125)])
def test_trap_11_only_fp8_scales_of_the_cache_are_raised_to_1(scheme: str, expected: float, tmp_path: Path) -> None:
    model, amax = llama(), 15.875  # 0.125 x 127
    for layer in range(2):
        for part in "kv":
            model.amax(f"{layer}.self_attention.core_attention", f"{part}_bmm_quantizer", amax)
    checkpoint = model.write(tmp_path / "c")
    tensors = rank0(export_quantized(checkpoint, tmp_path / "o", kv_cache=scheme))
    assert tensors[f"{FIRST}attention.kv_cache_scaling_factor"].item() == expected
    if scheme == "fp8":
        target = HuggingFaceOptions(quantization_format="modelopt")
        hf = export_quantized(checkpoint, tmp_path / "hf", target, kv_cache="fp8")
        found = tensors_of(hf / "model.safetensors")["model.layers.0.self_attn.k_proj.k_scale"]
        assert same(found, torch.tensor(amax) / 448)


def test_trap_12_weights_beyond_their_amax_saturate(tmp_path: Path) -> None:
    """Until torch 2.12 a cast of more than 464 gave NaN. An amax below the largest weight is normal (clipping)."""
    model = llama().fp8(lambda name: 2.5)
    for name in model.linears:
        model.amax(name, "weight_quantizer", model.weight(name).abs().max().reshape(1) / 2)
    tensors = rank0(export_quantized(model.write(tmp_path / "c"), tmp_path / "o"))
    codes = [tensor.view(torch.uint8) for tensor in tensors.values() if tensor.dtype == torch.float8_e4m3fn]
    assert len(codes) == 10 and not any(bool(((each & 0x7F) == 0x7F).any()) for each in codes)
    assert sum(bool(((each & 0x7F) == 0x7E).any()) for each in codes) >= 8  # 448; not in the smaller half of fc1


def test_trap_13_blocks_of_int4_that_ranks_would_tear(tmp_path: Path) -> None:
    checkpoint = awq(large(), torch.ones(128, dtype=torch.bfloat16)).write(tmp_path / "c")
    with pytest.raises(ExportError, match=r"attention.dense.weight: 64 columns on a rank do not divide") as caught:
        export_quantized(checkpoint, tmp_path / "o", TrtllmOptions(tp_size=2))
    assert "mlp.proj" in str(caught.value) and not (tmp_path / "o").exists()


def test_trap_14_a_state_with_bytes_in_it_is_no_proof_of_fp8(tmp_path: Path) -> None:
    """TransformerEngine 2.0 to 2.3 pickles None; ModelOpt's states are dictionaries of its own."""
    pickled_none = te_state("2.1", None)
    assert pickled_none.numel() > 0
    checkpoint = llama().te(lambda name: pickled_none).write(tmp_path / "a")
    with pytest.raises(ExportError, match=r"it did not run in FP8 \(its state: pickled None\)"):
        export_quantized(checkpoint, tmp_path / "o", algorithm="fp8")
    model = llama()
    for name in model.linears:
        disabled = properties(E4M3, disabled=True)
        model.modelopt(name, weight_quantizer=disabled, input_quantizer=disabled)
    tensors = rank0(export_quantized(model.write(tmp_path / "b"), tmp_path / "p"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_trap_15_a_list_of_excluded_modules_replaces_the_loaders_own(tmp_path: Path) -> None:
    model = mixtral().fp8(lambda name: 2.5)
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o")
    listed = config_of(output)["quantization"]["exclude_modules"]  # type: ignore[index]
    assert listed == ["lm_head", "transformer.layers.0.mlp.router", "transformer.layers.1.mlp.router"]
    tensors = rank0(output)
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors[f"{FIRST}mlp.router.weight"].dtype == torch.float32
