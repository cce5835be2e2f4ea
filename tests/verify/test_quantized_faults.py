"""Codes and scales that are wrong, in exports whose manifests agree with them: each is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.quantized import SCHEMES, export_here, read, reshard  # noqa: E402
from verify.faulty import Tensors, adopt_the_plan, change, messages, verify  # noqa: E402

from dist_export.models import quantization  # noqa: E402
from dist_export.quantization import QuantizationOptions  # noqa: E402
from dist_export.targets.huggingface.target import HuggingFaceOptions  # noqa: E402
from dist_export.targets.trtllm.target import TrtllmOptions  # noqa: E402

Checkpoints = dict[str, Path]
LAYER = "transformer.layers.{}."
HF_OPTIONS = tuple(HuggingFaceOptions(quantization_format=each) for each in ("modelopt", "compressed-tensors"))
REFUSED = [("int8_sq", HF_OPTIONS[0])]
EXPORTS = [
    (scheme, options)
    for scheme in SCHEMES
    for options in (TrtllmOptions(tp_size=2), TrtllmOptions(pp_size=2), *HF_OPTIONS)
    if (scheme, options) not in REFUSED
]


@pytest.mark.parametrize("scheme, options", EXPORTS)
def test_a_right_export_is_verified_to_the_last_byte(
    scheme: str, options: TrtllmOptions | HuggingFaceOptions, quantized_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    output = export_here(quantized_checkpoints[scheme], tmp_path / "out", options)
    report = verify(quantized_checkpoints[scheme], output)
    assert report.ok, str(report)
    assert not report.warnings
    assert report.num_bytes_compared == report.num_bytes_checked > 500_000


@pytest.fixture(scope="module")
def whole(quantized_checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`whole("fp8")` is a right export of that model to one rank, not to be changed."""
    made: dict[str, Path] = {}

    def get(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = export_here(quantized_checkpoints[scheme], tmp_path_factory.mktemp("whole") / "out")
        return made[scheme]

    return get


def swapped(first: str, second: str) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[first], tensors[second] = tensors[second].copy(), tensors[first].copy()

    return edit


def changed(name: str, formula: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = formula(tensors[name])

    return edit


def floats(formula: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda raw: formula(raw.view(np.float32)).astype(np.float32).view(np.uint32)


def flipped(raw: np.ndarray) -> np.ndarray:
    result = raw.copy()
    result[3, 5] ^= 4
    return result


QKV, DENSE, PROJ = (LAYER.format(0) + name for name in ("attention.qkv.", "attention.dense.", "mlp.proj."))
FC, GATE = LAYER.format(0) + "mlp.fc.", LAYER.format(0) + "mlp.gate."
DENSE_1 = DENSE.replace("layers.0", "layers.1")
SCALE, INPUT = "weights_scaling_factor", "activation_scaling_factor"
FAULTS = {
    "scale of another layer": ("fp8", swapped(DENSE + SCALE, DENSE_1 + SCALE), DENSE + SCALE, "it is that of layer 1"),
    "input scale of another layer": ("fp8", swapped(DENSE + INPUT, DENSE_1 + INPUT), DENSE + INPUT,
                                     "it is that of layer 1"),
    "second scale of another layer": ("nvfp4", swapped(DENSE + SCALE + "_2", DENSE_1 + SCALE + "_2"),
                                      DENSE + SCALE + "_2", "it is that of layer 1"),
    "factor of another layer": ("int4_awq", swapped(PROJ + "prequant_scaling_factor",
                                                    PROJ.replace(".0.", ".1.") + "prequant_scaling_factor"),
                                PROJ + "prequant_scaling_factor", "it is that of layer 1"),
    "never calibrated": ("fp8", changed(QKV + INPUT, floats(np.ones_like)), QKV + INPUT,
                         "it is all one, as if nothing had been calibrated"),
    "lost factor": ("int4_awq", changed(QKV + "prequant_scaling_factor", lambda raw: np.full_like(raw, 0x3F80)),
                    QKV + "prequant_scaling_factor", "it is all one"),
    "input scale for weight scale": ("fp8", swapped(PROJ + SCALE, PROJ + INPUT), PROJ + SCALE,
                                     "it is the scale of its activations"),
    "amax for scale": ("int8_sq", changed(QKV + SCALE, floats(lambda s: s * np.float32(127))), QKV + SCALE,
                       "it is the amax, not divided"),
    "divided by 8": ("int4_awq", changed(DENSE + SCALE, floats(lambda s: s * np.float32(7) / np.float32(8))),
                     DENSE + SCALE, "its amax is divided by 8, not by 7"),
    "reciprocal": ("fp8", changed(PROJ + SCALE, floats(lambda s: np.float32(1) / s)), PROJ + SCALE,
                   "it is the reciprocal"),
    "gate's row scales for up's": ("int8_sq", swapped(FC + SCALE, GATE + SCALE), FC + SCALE,
                                   "it is the scale of up where gate is meant"),
    "swapped codes": ("fp8", swapped(FC + "weight", GATE + "weight"), FC + "weight", "gate and up are swapped"),
    "codes of another layer": ("nvfp4", swapped(DENSE + "weight", DENSE_1 + "weight"), DENSE + "weight",
                               "it holds the codes of layer 1"),
    "block scales of another layer": ("nvfp4", swapped(DENSE + SCALE, DENSE_1 + SCALE), DENSE + SCALE,
                                      "it is that of layer 1"),
    "nibble order of INT4": ("int4_awq", changed(QKV + "weight", lambda raw: raw >> 4 | raw << 4), QKV + "weight",
                             "the two codes of each byte are swapped"),
    "nibble order of FP4": ("nvfp4", changed(QKV + "weight", lambda raw: raw >> 4 | raw << 4), QKV + "weight",
                            "the two codes of each byte are swapped"),
    "unsigned INT4": ("int4_awq", changed(QKV + "weight", lambda raw: raw ^ 0x88), QKV + "weight",
                      "its codes have 8 added"),
    "never written": ("int8_sq", changed(PROJ + "weight", np.zeros_like), PROJ + "weight", "it is all zero"),
    "flipped bit": ("int8_sq", changed(PROJ + "weight", flipped), PROJ + "weight", "one bit is flipped: mask 0x04"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(
    fault: str, whole: Callable[[str], Path], quantized_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    scheme, edit, name, mistake = FAULTS[fault]
    output = Path(shutil.copytree(whole(scheme), tmp_path / "out"))
    change(output, lambda tensors: edit(tensors["rank0.safetensors"]))
    expect(quantized_checkpoints[scheme], output, name, mistake)


def expect(checkpoint: Path, output: Path, name: str, mistake: str) -> None:
    report = verify(checkpoint, output, "coverage", "rebuild")
    found = [text for text in messages(report) if text.startswith("rebuild: ") and f": {name}: " in text]
    assert len(found) == 1, report
    assert mistake in found[0], found


def weight(checkpoint: Path, name: str) -> torch.Tensor:
    tensors, _, _ = read(checkpoint / "iter_0000010")
    return tensors[f"decoder.layers.0.{name}"].float()


def test_codes_by_the_scale_of_another_layer(
    whole: Callable[[str], Path], quantized_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    other = read(quantized_checkpoints["fp8"] / "iter_0000010")[0][
        "decoder.layers.1.self_attention.linear_proj.weight_quantizer._amax"
    ]
    replant(
        whole("fp8"), tmp_path, quantized_checkpoints["fp8"], DENSE,
        lambda w, s: (w / (other.float() / 448)).clamp(-448, 448).to(torch.float8_e4m3fn),
        "quantised by the scale of layer 1",
    )  # fmt: skip


def replant(
    whole: Path, tmp_path: Path, checkpoint: Path, target: str, formula: Callable[..., torch.Tensor], mistake: str
) -> None:
    """Attention's output quantised by another formula of weights and scale."""
    output = Path(shutil.copytree(whole, tmp_path / "out"))

    def edit(tensors: Tensors) -> None:
        rank = tensors["rank0.safetensors"]
        scale = torch.from_numpy(rank[target + SCALE].view(np.float32).copy())
        scale = scale[:, None] if scale.dim() == 1 and len(scale) > 1 else scale
        codes = formula(weight(checkpoint, "self_attention.linear_proj.weight"), scale)
        rank[target + "weight"] = codes.view(torch.uint8).numpy()

    change(output, edit)
    expect(checkpoint, output, target + "weight", mistake)


WRONG_ROUNDING = {
    "bfloat16 quotient": ("fp8", 1.0, lambda w, s: (w.bfloat16() / s[0]).to(torch.float8_e4m3fn),
                          "the quotients are rounded to bfloat16 first"),
    "cut off": ("int8_sq", 1.0, lambda w, s: (w / s).clamp(-128, 127).to(torch.int8), "values are cut off"),
    "not clamped": ("fp8", 0.25, lambda w, s: not_clamped(w / s), "values above 448 are not clamped"),
    "wrapped around": ("int8_sq", 0.5, lambda w, s: (w / s).round().to(torch.int32).to(torch.int8), "wrapped around"),
    "multiplied": ("fp8", 1.0, lambda w, s: (w * s).to(torch.float8_e4m3fn), "multiplied by the scale, not divided"),
}  # fmt: skip


def not_clamped(quotients: torch.Tensor) -> torch.Tensor:
    """What torch made of it before 2.12."""
    codes = quotients.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(quotients.abs() > 464, codes & 0x80 | 0x7F, codes)


@pytest.mark.parametrize("fault", WRONG_ROUNDING)
def test_codes_rounded_in_a_wrong_way(fault: str, quantized_checkpoints: Checkpoints, tmp_path: Path) -> None:
    scheme, share, formula, mistake = WRONG_ROUNDING[fault]

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        name = "decoder.layers.0.self_attention.linear_proj.weight_quantizer._amax"
        tensors[name] = (tensors[name].float() * share).to(tensors[name].dtype)

    checkpoint = reshard(quantized_checkpoints[scheme], tmp_path / "checkpoint", tp=2, edit=shrink)
    output = export_here(checkpoint, tmp_path / "right")
    assert verify(checkpoint, output).ok  # codes saturate
    replant(output, tmp_path, checkpoint, DENSE, formula, mistake)


@pytest.mark.parametrize("scheme", ["int8_sq", "int4_awq"])
def test_interleaved_amax_that_is_not_undone(
    scheme: str, quantized_checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelOpt saves the rows of a gated fc1's amax as training ranks held them; nothing fails if that is missed."""
    checkpoint = reshard(quantized_checkpoints[scheme], tmp_path / "checkpoint", tp=2)
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "_in_gate_up_order", lambda view, num_ranks: view)
        output = export_here(checkpoint, tmp_path / "out")
    adopt_the_plan(checkpoint, output)
    expect(checkpoint, output, FC + SCALE, "in the order of the training ranks (gate and up of each)")
    expect(checkpoint, output, GATE + "weight", "quantised with amax in the order of the training ranks")


def test_a_factor_folded_twice_or_not_at_all(quantized_checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = quantized_checkpoints["int4_awq"]
    output = export_here(checkpoint, tmp_path / "out", HF_OPTIONS[0])
    norm = "model.layers.0.input_layernorm.weight"
    original = read(checkpoint / "iter_0000010")[0]["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"]
    change(output, lambda tensors: tensors["model.safetensors"].update(
        {norm: original.bfloat16().view(torch.int16).numpy().view(np.uint16)}))  # fmt: skip
    report = verify(checkpoint, output)
    assert any(f"{norm}: " in text and "linear_qkv.layer_norm_weight" in text for text in messages(report)), report


def test_scales_of_the_kv_cache(quantized_checkpoints: Checkpoints, tmp_path: Path) -> None:
    """TensorRT-LLM's are at least one, those of Hugging Face folders are not."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            for number, each in enumerate("kv"):
                name = f"decoder.layers.{layer}.self_attention.core_attention.{each}_bmm_quantizer._amax"
                tensors[name] = torch.tensor([100.0 * (layer + 1) + 7 * number])

    checkpoint = reshard(quantized_checkpoints["fp8"], tmp_path / "checkpoint", tp=2, edit=add)
    options = QuantizationOptions(kv_cache="fp8")
    hugging_face = export_here(checkpoint, tmp_path / "hf", HF_OPTIONS[0], quantization=options)
    output = export_here(checkpoint, tmp_path / "out", TrtllmOptions(pp_size=2), quantization=options)
    assert verify(checkpoint, hugging_face).ok
    assert verify(checkpoint, output).ok
    value = np.array([107 / 448], np.float32)
    name = LAYER.format(0) + "attention.kv_cache_scaling_factor"
    change(output, lambda tensors: tensors["rank0.safetensors"].update({name: value.view(np.uint32)}))
    expect(checkpoint, output, name, "it is not clamped to 1")
    not_quantised = export_here(checkpoint, tmp_path / "none")
    assert any("4 quantiser tensors of a KV cache" in note for note in verify(checkpoint, not_quantised).warnings)


def test_quantiser_tensors_that_nothing_takes(quantized_checkpoints: Checkpoints, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.0.self_attention.linear_qkv.layer_norm_input_quantizer._amax"] = torch.ones(1)
        tensors["decoder.layers.1.mlp.linear_fc2.weight_quantizer._global_amax"] = torch.ones(1)

    checkpoint = reshard(quantized_checkpoints["fp8"], tmp_path / "checkpoint", tp=2, edit=add)
    report = verify(checkpoint, export_here(checkpoint, tmp_path / "out"))
    assert messages(report) == [
        "coverage: plan: 1 quantiser tensors of quantised linears are not used: "
        "decoder.layers.1.mlp.linear_fc2.weight_quantizer._global_amax"
    ]
    assert [note for note in report.warnings if "1 quantiser tensors of the inputs of norms" in note]
