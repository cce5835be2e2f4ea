"""Quantised exports equal, byte for byte, what ModelOpt's own writers make of the same weights, amax and factors.

The expected tensors are hashes (record_quantized.py, which names two exceptions). The same model saved by other
training layouts, exported by other numbers of processes, in little memory or in two attempts must give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import config_of, export, fingerprints, run_command, tensors_of
from support.faulty_runs import run, weights
from support.quantized import SCHEMES, export_here, read, reshard

from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions

HERE = Path(__file__).parent
EXPECTED = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "expected_quantized").glob("*.json"))}
Checkpoints = dict[str, Path]


def check_ranks(output: Path, expected: dict[str, Any]) -> None:
    for rank, tensors in enumerate(expected["ranks"]):
        assert fingerprints(output / f"rank{rank}.safetensors") == tensors
    assert not (output / f"rank{len(expected['ranks'])}.safetensors").exists()
    assert config_of(output)["quantization"] == expected["quantization"]


@pytest.mark.parametrize("layout", ["tp1pp1", "tp2pp1"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensorrt_llm(scheme: str, layout: str, quantized_checkpoints: Checkpoints, tmp_path: Path) -> None:
    options = TrtllmOptions(tp_size=int(layout[2]))
    output = export_here(quantized_checkpoints[scheme], tmp_path / "out", options)
    check_ranks(output, EXPECTED[scheme]["layouts"][layout])


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if "huggingface" in EXPECTED[scheme]])
def test_hugging_face(scheme: str, quantized_checkpoints: Checkpoints, tmp_path: Path) -> None:
    expected = EXPECTED[scheme]["huggingface"]
    options = HuggingFaceOptions(quantization_format="modelopt")
    output = export_here(quantized_checkpoints[scheme], tmp_path / "out", options)
    assert fingerprints(output / "model.safetensors") == expected["tensors"]
    assert config_of(output)["quantization_config"] == expected["quantization_config"]
    assert json.loads((output / "hf_quant_config.json").read_text()) == expected["hf_quant_config"]


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layout_of_training_does_not_matter(
    scheme: str, tp: int, quantized_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """ModelOpt keeps the rows of a gated fc1's amax as the training ranks held them: another order for each tp."""
    checkpoint = reshard(quantized_checkpoints[scheme], tmp_path / "checkpoint", tp=tp)
    output = export_here(checkpoint, tmp_path / "out", TrtllmOptions(tp_size=2))
    check_ranks(output, EXPECTED[scheme]["layouts"]["tp2pp1"])


RUNS = [("int4_awq", 3, "256k"), ("nvfp4", 4, "1g"), ("fp8", 2, "64k")]


@pytest.mark.parametrize("scheme, num_processes, memory", RUNS)
def test_processes_and_memory_do_not_change_a_byte(
    scheme: str, num_processes: int, memory: str, quantized_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    options = ("--tp", 2, "--num-processes", num_processes, "--host-memory", memory)
    output = export(quantized_checkpoints[scheme], tmp_path / "out", *options)
    check_ranks(output, EXPECTED[scheme]["layouts"]["tp2pp1"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pipeline_stages_divide_the_layers(scheme: str, quantized_checkpoints: Checkpoints, tmp_path: Path) -> None:
    (whole,) = EXPECTED[scheme]["layouts"]["tp1pp1"]["ranks"]
    output = export_here(quantized_checkpoints[scheme], tmp_path / "out", TrtllmOptions(pp_size=2))
    found: dict[str, object] = {}
    for stage in range(2):
        for name, tensor in fingerprints(output / f"rank{stage}.safetensors").items():
            found[name.replace(".layers.0.", f".layers.{stage}.")] = tensor
    assert found == whole


@pytest.mark.parametrize("scheme", ["nvfp4"])
def test_amax_of_weights_that_is_not_stored_is_measured(
    scheme: str, quantized_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Calibration takes it from the very same weights. `verify` measures once more, in two processes."""

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_quantizer._amax")]:
            del tensors[name]

    checkpoint = reshard(quantized_checkpoints[scheme], tmp_path / "checkpoint", tp=2, edit=strip)
    output = export(checkpoint, tmp_path / "out", "--tp", 2, "--num-processes", 3)
    check_ranks(output, EXPECTED[scheme]["layouts"]["tp2pp1"])
    report = run_command("verify", checkpoint, output, "--num-processes", 2)
    assert report.returncode == 0, report.stdout + report.stderr


COLUMNS = {"attention.dense": 4, "mlp.proj": 4}


@pytest.mark.parametrize("scheme", ["fp8", "int8_sq", "nvfp4"])
def test_four_ranks_hold_the_parts_of_one(scheme: str, quantized_checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Of codes and of scales; key and value heads are repeated, as there are two for four ranks."""
    one = tensors_of(export_here(quantized_checkpoints[scheme], tmp_path / "one") / "rank0.safetensors")
    four = export_here(quantized_checkpoints[scheme], tmp_path / "four", TrtllmOptions(tp_size=4))
    ranks = [tensors_of(four / f"rank{rank}.safetensors") for rank in range(4)]
    for name, whole in one.items():
        parts = [tensors[name] for tensors in ranks]
        if name.startswith(("lm_head", "transformer.vocab")):
            assert raw(torch.cat(parts)[:250]) == raw(whole)
        elif whole.numel() == 1 or "layernorm" in name or "ln_f" in name:
            assert all(raw(part) == raw(whole) for part in parts)
        elif ".qkv." in name and whole.shape[0] == 384:
            assert all(raw(part) == raw(qkv_of(whole, rank)) for rank, part in enumerate(parts))
        elif any(each in name for each in COLUMNS):
            is_rows = name.endswith("weights_scaling_factor") and whole.dim() == 1
            assert all(raw(p) == raw(whole) for p in parts) if is_rows else raw(torch.cat(parts, -1)) == raw(whole)
        elif "prequant" in name:
            assert all(raw(part) == raw(whole) for part in parts)
        else:
            assert raw(torch.cat(parts)) == raw(whole), name


def qkv_of(whole: torch.Tensor, rank: int) -> torch.Tensor:
    """A rank's two query heads of 32 rows, and the one key and value head that they share with a neighbour."""
    kv = rank // 2 * 32
    parts = [whole[rank * 64 : rank * 64 + 64], whole[256 + kv : 288 + kv], whole[320 + kv : 352 + kv]]
    return torch.cat([part.view(torch.uint8) for part in parts]).view(whole.dtype)


def raw(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("scheme", ["int4_awq", "fp8"])
def test_what_is_left_after_a_kill_is_gone_on_with(
    scheme: str, quantized_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoint, options = quantized_checkpoints[scheme], ("--tp", 2, "--host-memory", "256k")
    fault = {"rank": 0, "point": "transfer", "action": "kill", "after": 20, "pace": 0.02}
    killed = run(checkpoint, tmp_path / "out", *options, **fault)
    assert killed.code == 3 and "rank 0 was killed" in killed.err, killed.err
    staging = tmp_path / ".out.dist_export"
    assert (staging / "scales.json").is_file() == (scheme == "fp8")  # scales of blocks are stored beside their weights
    ended = run(checkpoint, tmp_path / "out", *options, "--resume", num_processes=3)
    assert ended.code == 0, ended.err
    check_ranks(tmp_path / "out", EXPECTED[scheme]["layouts"]["tp2pp1"])
    assert "scales.json" not in weights(tmp_path / "out")
    whole = export_here(checkpoint, tmp_path / "whole", TrtllmOptions(tp_size=2))
    reports = [json.loads((each / "quantization_report.json").read_text()) for each in (tmp_path / "out", whole)]
    assert reports[0] == reports[1], "the report tells of what the killed run wrote, too"


def test_the_report_tells_of_scales_noise_and_saturation(quantized_checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The same for any number of processes; recomputed here from the codes of one tensor."""

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.1.mlp.linear_fc2.weight_quantizer._amax"] *= 0.5

    checkpoint = reshard(quantized_checkpoints["fp8"], tmp_path / "checkpoint", tp=2, edit=shrink)
    output = export_here(checkpoint, tmp_path / "out")
    report = json.loads((output / "quantization_report.json").read_text())
    assert (
        json.loads((output / "export_manifest.json").read_text())["quantization_report"] == "quantization_report.json"
    )
    name = "transformer.layers.1.mlp.proj."
    tensors, found = tensors_of(output / "rank0.safetensors"), report["tensors"][name + "weight"]
    weights = read(checkpoint / "iter_0000010")[0]["decoder.layers.1.mlp.linear_fc2.weight"].double()
    scale = tensors[name + "weights_scaling_factor"]
    noise = tensors[name + "weight"].double() * scale.double() - weights
    assert found["num_measured"] == weights.numel()
    assert found["scale"] == scale.item()
    assert found["snr_db"] == pytest.approx(10 * torch.log10((weights**2).sum() / (noise**2).sum()).item(), abs=0.02)
    saturated = ((weights.float() / scale).abs() > 464).double().mean().item()
    assert 0 < saturated == pytest.approx(found["saturated"], rel=1e-3)
    assert report["worst"][0] == {"tensor": name + "weight", "snr_db": found["snr_db"]}
    several = export(checkpoint, tmp_path / "several", "--num-processes", 3)
    assert json.loads((several / "quantization_report.json").read_text()) == report
