"""Calibration with ModelOpt: what it finds and what is exported with it equal what a person does by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.exports import fingerprints
from support.tokenizers import WORDS, save_tokenizer

from dist_export import api
from dist_export.api import Source
from dist_export.cli import main
from dist_export.errors import ExportError
from dist_export.targets.trtllm.target import TrtllmOptions

torch = pytest.importorskip("torch")
pytest.importorskip("modelopt", reason="calibration is ModelOpt's")
pytest.importorskip("megatron.core")
safetensors_torch = pytest.importorskip("safetensors.torch")

BY_HAND = Path(__file__).parent / "quantize_by_hand.py"
SIZES = {"hidden": 256, "heads": 8, "kv-groups": 4, "ffn": 256, "layers": 2}
SCHEMES = ("fp8", "int8_sq", "int4_awq", "nvfp4")
HF = ("hf", "--hf-quantization-format", "modelopt")
SMOOTHED = ("int8_sq", "int4_awq")


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SCHEME/ is a checkpoint that ModelOpt quantised, SCHEME.safetensors what its quantisers hold."""
    folder = tmp_path_factory.mktemp("by_hand")
    command = [sys.executable, str(BY_HAND), json.dumps(SIZES), str(folder), *SCHEMES]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def plain(megatron_checkpoint: Callable[..., Path]) -> Path:
    """The same weights as a training run of two tensor-parallel ranks saved them."""
    return megatron_checkpoint(tp=2, **{name.replace("-", "_"): value for name, value in SIZES.items()})


@pytest.fixture(scope="module")
def calibrated(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Scheme -> its calibration file, made by the command on the token ids that the other had."""
    sys.path.insert(0, str(BY_HAND.parent))
    import quantize_by_hand

    folder, made = tmp_path_factory.mktemp("calibrated"), {}
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in quantize_by_hand.tokens()))

    def calibrate(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = folder / f"{scheme}.safetensors"
            assert main(["calibrate", str(plain), str(made[scheme]), "--scheme", scheme, "--data", str(data)]) == 0
        return made[scheme]

    return calibrate


@pytest.mark.parametrize("scheme", SCHEMES)
def test_finds_what_modelopt_finds(scheme: str, calibrated: Callable[[str], Path], by_hand: Path) -> None:
    found = safetensors_torch.load_file(calibrated(scheme))
    hand = safetensors_torch.load_file(by_hand / f"{scheme}.safetensors")
    expected = {name: value for name, value in hand.items() if ".linear_" in name}
    smoothing = {name for name in found if name.endswith("._smoothing_scale")}
    assert found.keys() - smoothing == expected.keys()
    assert len(smoothing) == (8 if scheme in SMOOTHED else 0)
    for name, value in expected.items():
        assert torch.equal(found[name].reshape(-1), value.reshape(-1)), name
        assert found[name].dtype == value.dtype, name


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        *((scheme, ("trtllm", "--tp", tp)) for scheme in SCHEMES for tp in "12"),
        *((scheme, HF) for scheme in SCHEMES if scheme != "int8_sq"),  # which ModelOpt's layout has no reader for
    ],
)
def test_exports_what_modelopt_quantised(
    scheme: str,
    target: tuple[str, ...],
    plain: Path,
    calibrated: Callable[[str], Path],
    by_hand: Path,
    tmp_path: Path,
) -> None:
    """Byte for byte what is exported of a checkpoint that ModelOpt quantised."""
    options = ["--target", *target, "--num-processes", "1"]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    asked = ["--quantization", scheme, "--calibration", str(calibrated(scheme))]
    assert main(["export", str(plain), str(ours), *options, *asked]) == 0
    assert main(["export", str(by_hand / scheme), str(theirs), *options]) == 0
    files = [path.name for path in sorted(theirs.glob("*.safetensors"))]
    assert files
    for name in files:
        assert fingerprints(ours / name) == fingerprints(theirs / name), name
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())


def test_kept_precision_is_not_smoothed(plain: Path, calibrated: Callable[[str], Path], tmp_path: Path) -> None:
    """compressed-tensors has no place for the factor of attention's output: its weight is the checkpoint's own."""
    common = ["--target", "hf", "--num-processes", "1"]
    asked = ["--quantization", "int4_awq", "--calibration", str(calibrated("int4_awq"))]
    assert main(["export", str(plain), str(tmp_path / "awq"), *common, *asked]) == 0
    assert main(["export", str(plain), str(tmp_path / "bf16"), *common]) == 0
    quantized, kept = (fingerprints(tmp_path / name / "model.safetensors") for name in ("awq", "bf16"))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert quantized[name] == kept[name]
    assert quantized.keys() - kept.keys()


def test_texts_are_their_tokens(plain: Path, tmp_path: Path) -> None:
    """A file of texts with a tokenizer calibrates as the file of their token ids does."""
    pytest.importorskip("transformers")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    words = ["the", "cat", "sat", "word99", "word120"]
    ids = [WORDS.index(word) if word in WORDS else int(word.removeprefix("word")) for word in words]
    (tmp_path / "texts.jsonl").write_text(json.dumps({"article": " ".join(words), "highlights": "a cat"}))
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
    for name, more in (("texts.jsonl", ["--tokenizer", str(tokenizer)]), ("ids.txt", [])):
        command = ["calibrate", str(plain), str(tmp_path / f"{name}.safetensors"), "--data", str(tmp_path / name)]
        assert main([*command, *more]) == 0
    files = [tmp_path / f"{name}.safetensors" for name in ("texts.jsonl", "ids.txt")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("scheme", "asked", "message"),
    [
        ("fp8", ["--quantization", "int8_sq"], r"needs what smooths every linear; .*calibrate --scheme int8_sq"),
        ("int8_sq", ["--quantization", "fp8"], "the file says how to smooth them .*: it was made for another scheme"),
        ("int8_sq", [], "quantiser tensors but no state that tells"),
    ],
)
def test_file_of_another_scheme(
    scheme: str,
    asked: list[str],
    message: str,
    plain: Path,
    calibrated: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = ["export", str(plain), str(tmp_path / "out"), *asked, "--calibration", str(calibrated(scheme))]
    assert main(command) == 2
    assert re.search(message, capfd.readouterr().err)


def test_smoothing_twice(by_hand: Path, calibrated: Callable[[str], Path], tmp_path: Path) -> None:
    """A calibration file beside a checkpoint that is smoothed already."""
    smoothing = {n: v for n, v in safetensors_torch.load_file(calibrated("int8_sq")).items() if "_smoothing" in n}
    safetensors_torch.save_file(smoothing, tmp_path / "again.safetensors")
    model = api.open_model(Source(checkpoint=by_hand / "int8_sq", calibration=tmp_path / "again.safetensors"))
    with pytest.raises(ExportError, match="ModelOpt has quantised this checkpoint, and its weights are stored as"):
        api.plan_job(model, [TrtllmOptions()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ["{}"]}, r"data.jsonl, line 1: has none of text, article, .*; its fields are"),
        ({"data": ['{"text": "a cat"}']}, r"the data are texts: name a folder with a tokenizer \(--tokenizer\)"),
        (
            {"data": ['{"tokens": [1, 250]}', '{"tokens": [1]}']},
            r"(?s)vocabulary of 250.*sample 1: has 1 tokens",
        ),
        ({"data": ["{"]}, "line 1: not JSON"),
        ({"exists": True}, "exists already; give --overwrite"),
    ],
)
def test_bad_input(
    change: dict[str, list[str]], message: str, plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, file = tmp_path / "data.jsonl", tmp_path / "out.safetensors"
    data.write_text("\n".join(change.get("data", ['{"tokens": [1, 2]}'])))
    if "exists" in change:
        file.write_bytes(b"")
    assert main(["calibrate", str(plain), str(file), "--data", str(data)]) == 2
    assert re.search(message, capfd.readouterr().err)
    assert file.exists() == ("exists" in change)


def test_linears_that_megatron_core_has_not(tmp_path: Path) -> None:
    """Gemma 2 norms what its row-parallel linears give: they are quantised as Megatron-Core's own."""
    checkpoint = Path(__file__).parents[1] / "conformance" / "checkpoints" / "gemma2_bridge_core_0_16_tp2"
    (tmp_path / "ids.txt").write_text("1 2 3 4\n5 6 7")
    command = ["calibrate", str(checkpoint), str(tmp_path / "fp8.safetensors"), "--data", str(tmp_path / "ids.txt")]
    assert main(command) == 0
    found = safetensors_torch.load_file(tmp_path / "fp8.safetensors")
    assert len([name for name in found if name.endswith("linear_proj.input_quantizer._amax")]) == 2
    assert len(found) == 2 * 4 * 2  # layers x linears x quantisers
