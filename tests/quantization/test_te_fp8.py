"""FP8 from training with TransformerEngine: activation scales from its states, weight scales from the weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.exports import config_of, run_command, tensors_of
from support.other_formats import pack, write_nemo_folder
from support.quantizable import export_quantized, fp8_codes, llama, mixtral, same
from support.quantizer_states import RELEASES, split_state, te_state
from support.small_models import LLAMA, small_model
from support.torch_dist import megatron_chunks

from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions

LAYER = "transformer.layers.{}."
NAMES = {
    "self_attention.linear_qkv": ("attention.qkv",),
    "self_attention.linear_proj": ("attention.dense",),
    "mlp.linear_fc1": ("mlp.fc", "mlp.gate"),
    "mlp.linear_fc2": ("mlp.proj",),
}


def scale_fwd(name: str) -> float:
    """Another one for every linear, with many digits."""
    layer, module = name.split(".", 1)
    return 448 / (3.1 + 7 * int(layer) + list(NAMES).index(module) / 3)


def state(name: str, release: str = "2.1") -> Any:
    scale = torch.tensor([scale_fwd(name), 77.0, 1.0])
    return te_state(release, scale, torch.stack([0 * scale, 448 / scale]))


@pytest.mark.parametrize("release", RELEASES)
def test_scales_of_every_release(release: str, tmp_path: Path) -> None:
    model = llama().te(lambda name: state(name, release))
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o", algorithm="fp8")
    tensors = tensors_of(output / "rank0.safetensors")
    for layer in range(2):
        for module, targets in NAMES.items():
            weight = model.weight(f"{layer}.{module}")
            weight_scale = weight.float().abs().max().reshape(1) / 448  # of all rows of the fused module
            input_scale = torch.tensor([1.0]) / torch.tensor([scale_fwd(f"{layer}.{module}")])
            for target in targets:
                head = LAYER.format(layer) + target
                assert same(tensors[f"{head}.activation_scaling_factor"], input_scale)
                assert same(tensors[f"{head}.weights_scaling_factor"], weight_scale)
        gate, up = model.weight(f"{layer}.mlp.linear_fc1").chunk(2)
        scale = model.weight(f"{layer}.mlp.linear_fc1").float().abs().max().reshape(1) / 448
        assert same(tensors[LAYER.format(layer) + "mlp.fc.weight"], fp8_codes(gate, scale))
        assert same(tensors[LAYER.format(layer) + "mlp.gate.weight"], fp8_codes(up, scale))
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    table = config_of(output)["quantization"]
    assert table == {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


def test_shards_of_training_and_target_share_the_scales(tmp_path: Path) -> None:
    model = llama().te(state)
    export_quantized(model.write(tmp_path / "a"), tmp_path / "one", algorithm="fp8")
    cut = model.write(tmp_path / "b", chunks=megatron_chunks(tp=2))
    export_quantized(cut, tmp_path / "two", TrtllmOptions(tp_size=2), algorithm="fp8")
    whole = tensors_of(tmp_path / "one" / "rank0.safetensors")
    ranks = [tensors_of(tmp_path / "two" / f"rank{rank}.safetensors") for rank in range(2)]
    for name, tensor in whole.items():
        if name.endswith("_scaling_factor"):
            assert all(same(rank[name], tensor) for rank in ranks), name
    proj = LAYER.format(1) + "mlp.proj.weight"
    assert same(torch.cat([rank[proj].view(torch.uint8) for rank in ranks], 1), whole[proj].view(torch.uint8))


def test_hugging_face(tmp_path: Path) -> None:
    model = llama().te(state)
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o", HuggingFaceOptions(), algorithm="fp8")
    tensors = tensors_of(output / "model.safetensors")
    head = "model.layers.1.mlp."
    scale = model.weight("1.mlp.linear_fc1").float().abs().max() / 448
    for name, weight in zip(("gate_proj", "up_proj"), model.weight("1.mlp.linear_fc1").chunk(2), strict=True):
        assert same(tensors[f"{head}{name}.weight_scale"], scale)
        assert same(tensors[f"{head}{name}.input_scale"], 1 / torch.tensor(scale_fwd("1.mlp.linear_fc1")))
        assert same(tensors[f"{head}{name}.weight"], fp8_codes(weight, scale))


def edges_in_bf16(name: str) -> Any:
    """As Megatron trains with ``first_last_layers_bf16``."""
    return te_state("2.10", None) if name.startswith(("0.", "2.")) else state(name, "2.10")


def test_layers_outside_of_fp8_are_named_with_the_patterns_that_leave_them_out(tmp_path: Path) -> None:
    checkpoint = llama(3).te(edges_in_bf16).write(tmp_path / "c")
    process = run_command("export", checkpoint, tmp_path / "o", "--quantization", "fp8")
    assert process.returncode == 2
    for layer in (0, 2):
        for module in NAMES:
            assert f"decoder.layers.{layer}.{module}: it did not run in FP8 (its state: empty tensor)" in process.stderr
    assert "layers.1." not in process.stderr
    hint = "--exclude 'decoder.layers.0.*' --exclude 'decoder.layers.2.*'"
    assert hint in process.stderr
    options = ("--exclude", "decoder.layers.0.*", "--exclude", "decoder.layers.2.*")
    process = run_command("export", checkpoint, tmp_path / "o", "--quantization", "fp8", *options)
    assert process.returncode == 0, process.stderr
    tensors = tensors_of(tmp_path / "o" / "rank0.safetensors")
    kinds = [tensors[LAYER.format(layer) + "mlp.proj.weight"].dtype for layer in range(3)]
    assert kinds == [torch.bfloat16, torch.float8_e4m3fn, torch.bfloat16]
    assert LAYER.format(0) + "mlp.proj.activation_scaling_factor" not in tensors
    listed = [LAYER.format(layer) + name for layer in (0, 2) for names in NAMES.values() for name in names]
    found = config_of(tmp_path / "o")["quantization"]["exclude_modules"]  # type: ignore[index]
    assert sorted(found) == sorted(["lm_head", *listed])


@pytest.mark.parametrize(
    ("value", "seen", "message"),
    [
        (1.0, 0.0, "was never calibrated"),
        (float("nan"), 1.0, "is NaN"),
        (0.0, 1.0, "is zero"),
        (float("inf"), 1.0, "is infinite"),
        (-2.0, 1.0, "is negative"),
    ],
)
def test_scales_that_cannot_be_used_are_named(value: float, seen: float, message: str, tmp_path: Path) -> None:
    def broken(name: str) -> Any:
        if name not in ("0.mlp.linear_fc2", "1.self_attention.linear_qkv"):
            return state(name)
        return te_state("2.1", torch.tensor([value, 1.0, 1.0]), torch.tensor([[0.0] * 3, [seen] * 3]))

    checkpoint = llama().te(broken).write(tmp_path / "c")
    with pytest.raises(ExportError, match=message) as caught:
        export_quantized(checkpoint, tmp_path / "o", algorithm="fp8")
    assert "decoder.layers.0.mlp.linear_fc2" in str(caught.value)
    assert "decoder.layers.1.self_attention.linear_qkv" in str(caught.value)
    assert "0.mlp.linear_fc1" not in str(caught.value) and not (tmp_path / "o").exists()


def test_states_of_training_ranks_that_differ_are_named(tmp_path: Path) -> None:
    """Legacy files have a state per rank: different ones were never reduced over the ranks."""
    model = llama(tensor_model_parallel_size=2)
    for rank in range(2):
        tensors = {}
        for name, tensor in model.tensors.items():
            row_parallel = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            whole = tensor.dim() == 1
            tensors[name] = tensor if whole else tensor.chunk(2, int(row_parallel))[rank].clone()
        for name in model.linears:
            factor = 1 + rank if name == "1.mlp.linear_fc2" else 1
            scale = torch.tensor([scale_fwd(name) * factor, 1.0, 1.0])
            tensors[f"decoder.layers.{name}._extra_state"] = te_state("2.1", scale)
        saved = {"model": tensors, "args": argparse.Namespace(**model.args), "iteration": 10, "checkpoint_version": 3.0}
        folder = tmp_path / "c" / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        torch.save(saved, folder / "model_optim_rng.pt")
    with pytest.raises(ExportError, match=r"linear_fc2: the scale of the input is .* in .*mp_rank_00 and .*mp_rank_01"):
        export_quantized(tmp_path / "c", tmp_path / "o", algorithm="fp8")
    export_quantized(tmp_path / "c", tmp_path / "o", algorithm="fp8", exclude=("decoder.layers.1.mlp.linear_fc2",))


def test_a_history_of_zeros_is_no_fault(tmp_path: Path) -> None:
    """Megatron keeps a history of one entry by default, which is zero after each step: the scale alone tells."""
    model = llama().te(lambda name: te_state("2.1", torch.tensor([scale_fwd(name), 1.0, 1.0]), torch.zeros(1, 3)))
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o", algorithm="fp8")
    found = tensors_of(output / "rank0.safetensors")[LAYER.format(0) + "attention.qkv.activation_scaling_factor"]
    assert same(found, 1 / torch.tensor([scale_fwd("0.self_attention.linear_qkv")]))


@pytest.mark.parametrize("recipe", ["Float8CurrentScaling", "MXFP8BlockScaling"])
def test_training_that_kept_no_scales(recipe: str, tmp_path: Path) -> None:
    checkpoint = llama().te(lambda name: te_state("2.10", None, recipe=recipe)).write(tmp_path / "c")
    with pytest.raises(ExportError, match=rf"trained with {recipe}.*--quantization fp8_per_channel"):
        export_quantized(checkpoint, tmp_path / "o", algorithm="fp8")


def test_calibration_gives_what_training_does_not(tmp_path: Path) -> None:
    model = llama(3).te(edges_in_bf16)
    amax = {
        f"decoder.layers.{layer}.{module}.input_quantizer._amax": torch.tensor(5.0 + layer)
        for layer in (0, 2)
        for module in NAMES
    }
    save_file(amax, tmp_path / "amax.safetensors")
    options = {"algorithm": "fp8", "calibration": tmp_path / "amax.safetensors"}
    output = export_quantized(model.write(tmp_path / "c"), tmp_path / "o", **options)
    tensors = tensors_of(output / "rank0.safetensors")
    for layer, expected in ((0, 5 / 448), (2, 7 / 448), (1, 1 / scale_fwd("1.mlp.linear_fc2"))):
        found = tensors[LAYER.format(layer) + "mlp.proj.activation_scaling_factor"]
        assert found.item() == pytest.approx(expected, rel=1e-7)


INPUTS = torch.tensor([40.0, 50.0, 60.0, 70.0])


def grouped(release: str, *, interleaved: bool) -> Any:
    """Four experts on two training ranks: what each expert's record holds."""
    states = {}
    for rank in range(2):
        kinds = torch.stack([INPUTS[2 * rank : 2 * rank + 2], torch.tensor([11.0, 12.0]), torch.ones(2)])
        flat = (kinds.T if interleaved else kinds).reshape(-1).contiguous()
        for local, part in enumerate(split_state(release, flat, torch.stack([0 * flat, 448 / flat]))):
            states[2 * rank + local] = part
    return lambda name: states[int(name.split(".")[4])] if ".experts." in name else state(name, release)


@pytest.mark.parametrize(("te_version", "interleaved"), [("2.2", False), ("2.3", True)])
def test_grouped_experts(te_version: str, interleaved: bool, tmp_path: Path) -> None:
    """One input scale for all experts, the largest; which entries are inputs depends on the release."""
    model = mixtral(expert_model_parallel_size=2, moe_grouped_gemm=True).te(grouped("2.3", interleaved=interleaved))
    checkpoint = model.write(tmp_path / "c")
    with pytest.raises(ExportError, match=r"changed with TransformerEngine 2.3"):
        export_quantized(checkpoint, tmp_path / "o", algorithm="fp8")
    output = export_quantized(checkpoint, tmp_path / "o", algorithm="fp8", te_version=te_version)
    tensors = tensors_of(output / "rank0.safetensors")
    for layer in range(2):
        head, experts = LAYER.format(layer) + "mlp.", [f"{layer}.mlp.experts.experts.{e}." for e in range(4)]
        assert same(tensors[head + "fc.activation_scaling_factor"], 1 / torch.tensor([40.0]))
        weights = torch.stack([model.weight(expert + "linear_fc2") for expert in experts])
        scales = weights.float().abs().amax((1, 2)).reshape(4, 1) / 448
        assert same(tensors[head + "proj.weights_scaling_factor"], scales)
        assert same(tensors[head + "proj.weight"], fp8_codes(weights, scales[..., None]))
    hf = export_quantized(checkpoint, tmp_path / "hf", HuggingFaceOptions(), algorithm="fp8", te_version=te_version)
    found = tensors_of(hf / "model.safetensors")
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w2.input_scale"
        assert same(found[name], 1 / INPUTS[expert])


def test_an_expert_that_saw_no_token_in_training(tmp_path: Path) -> None:
    def one_unused(name: str) -> Any:
        if ".experts.2." in name:
            return te_state("2.1", torch.ones(3), torch.zeros(2, 3))
        return state(name) if ".experts." not in name else te_state("2.1", torch.tensor([INPUTS[0].item(), 9.0, 1.0]))

    checkpoint = mixtral().te(one_unused).write(tmp_path / "c")
    output = export_quantized(checkpoint, tmp_path / "o", algorithm="fp8")
    found = tensors_of(output / "rank0.safetensors")["transformer.layers.0.mlp.fc.activation_scaling_factor"]
    assert same(found, 1 / INPUTS[:1])  # and not 1.0
    hf = export_quantized(checkpoint, tmp_path / "hf", HuggingFaceOptions(), algorithm="fp8")
    name = "model.layers.0.block_sparse_moe.experts.2.w1.input_scale"
    assert same(tensors_of(hf / "model.safetensors")[name], 1 / INPUTS[0])


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    checkpoint = llama().te(state).write(tmp_path / "c")
    with pytest.raises(ExportError, match=r"--exclude layers.0.*: matches no linear.*like decoder.layers.0"):
        export_quantized(checkpoint, tmp_path / "o", algorithm="fp8", exclude=("layers.0.*",))
    with pytest.raises(ExportError, match=r"--te-version new: expected a release like 2.1"):
        export_quantized(checkpoint, tmp_path / "o", algorithm="fp8", te_version="new")


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_rank_files_in_an_archive_of_nemo(mode: str, tmp_path: Path) -> None:
    """A ``.nemo`` of NeMo 1 exports as the folder that it was."""
    model = small_model(LLAMA, num_layers=2, scale=0.1, ffn_hidden_size=128)
    folder = write_nemo_folder(tmp_path / "folder", model)
    state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in model.per_layer().items()}
    for name in [name for name in state if ".linear_" in name and name.endswith(".weight")]:
        scale = torch.tensor([100.0, 3.0, 1.0])
        state[f"{name.removesuffix('weight')}_extra_state"] = te_state("1.13", scale, torch.ones(2, 3))
    torch.save(state, folder / "model_weights.ckpt")
    archive = pack(folder, tmp_path / "model.nemo", mode=mode)
    outputs = [export_quantized(each, tmp_path / f"{each.name}.out", algorithm="fp8") for each in (folder, archive)]
    one, other = ((output / "rank0.safetensors").read_bytes() for output in outputs)
    assert one == other
    head = "transformer.layers.1.mlp.proj."
    assert tensors_of(outputs[1] / "rank0.safetensors")[f"{head}activation_scaling_factor"] == torch.tensor([0.01])
