"""Exports compute what Megatron-Core's own model computes from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from support.exports import export  # noqa: E402
from support.small_models import GPT, LLAMA, NEMOTRON, small_model  # noqa: E402
from support.torch_dist import megatron_chunks, write_torch_dist  # noqa: E402

from dist_export.errors import ExportError  # noqa: E402
from dist_export.models.overrides import parse_override  # noqa: E402
from dist_export.verify.logits import LogitsReport, compare_logits, read_tokens, verify_logits  # noqa: E402
from dist_export.verify.trace import LAYER_OUTPUT, Point, Trace  # noqa: E402

MEASURED = 2e-5
"""Above what equal weights show in these models: 6e-6 of the logits' spread, 4e-6 of a hidden state."""
BF16 = 5e-2

CHECKPOINTS = {
    "llama": {"style": "llama", "tp": 2, "pp": 2},
    "gpt": {"style": "gpt", "tp": 2},
    "nemotron": {"style": "nemotron", "tp": 2},
}
TP1, TP2, TP2PP2, TP4 = (("--tp", 1), ("--tp", 2), ("--tp", 2, "--pp", 2), ("--tp", 4))
HF = ("--target", "hf")

Finished = Callable[..., tuple[Path, Path]]
"""Of conftest.py: options of a checkpoint and of an export -> both folders."""


def check_equal(report: LogitsReport) -> None:
    assert report.agrees, str(report)
    assert report.difference.relative_difference < MEASURED
    assert max(state.relative for state in report.states) < MEASURED
    assert report.difference.top1_agreement == 1
    assert report.difference.kl_max < 1e-9


@pytest.mark.parametrize("target", [TP1, TP2, TP2PP2, TP4, HF], ids=lambda target: "".join(map(str, target)))
@pytest.mark.parametrize("style", CHECKPOINTS)
def test_an_export_computes_the_checkpoints_model(style: str, target: tuple[object, ...], finished: Finished) -> None:
    if target == HF:
        pytest.importorskip("transformers")
    report = verify_logits(*finished(CHECKPOINTS[style], *target))
    check_equal(report)
    assert report.difference.num_tokens == 64
    assert {state.point for state in report.states} >= {Point(LAYER_OUTPUT, layer) for layer in range(4)}
    assert (report.from_training is None) == (target == HF or style == "llama")
    if report.from_training is not None:
        assert report.from_training.relative_difference < BF16


@pytest.mark.parametrize(
    ("name", "target"), [("deepseek_v3", HF), ("moonlight_tp2", HF), ("gpt_oss", HF), ("decilm", TP2PP2)]
)
def test_uncommon_layers_compute_the_checkpoints_model(name: str, target: tuple[object, ...], tmp_path: Path) -> None:
    if target == HF:
        pytest.importorskip("transformers")
    model, *layout = name.rsplit("_", 1) if name.endswith("_tp2") else (name,)
    folder = Path(__file__).parents[1] / "conformance" / "checkpoints" / "_".join((model, "core_0_16", *layout))
    report = verify_logits(folder, export(folder, tmp_path / "out", *target))
    assert report.agrees, str(report)
    assert report.difference.relative_difference < MEASURED
    assert report.difference.top1_agreement == 1


VARIANTS = {
    "llama3-rope": (LLAMA, {}, {"rope_scaling": "llama3:8:1:4:32"}),
    "linear-rope": (LLAMA, {}, {"rope_scaling": "linear:4"}),
    "qkv-bias": (LLAMA, {"add_qkv_bias": True}, {}),
    "geglu-and-rope": ({**GPT, "position_embedding_type": "rope"}, {"gated_linear_unit": True}, {}),
    "gptj-rope": ({**GPT, "position_embedding_type": "rope"}, {"rotary_interleaved": True, "rotary_percent": 0.5}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_families(variant: str, tmp_path: Path) -> None:
    style, args, overrides = VARIANTS[variant]
    model = small_model(style, scale=0.15, **args)
    checkpoint = write_torch_dist(tmp_path / "checkpoint", model.tensors, args=model.args, chunks=megatron_chunks(tp=2))
    settings = [word for field, text in overrides.items() for word in ("--set", f"{field}={text}")]
    output = export(checkpoint, tmp_path / "out", "--tp", 2, *settings)
    given = {field: (parse_override(field, text), "the test") for field, text in overrides.items()}
    check_equal(verify_logits(checkpoint, output, overrides=given))
    if overrides:  # the comparison sees what they change
        assert "right at position 0 and wrong after it" in str(verify_logits(checkpoint, output))


@pytest.mark.parametrize(
    "options", [(), ("--no-parallel-embedding",), ("--embedding-sharding-dim", 1)], ids=["rows", "whole", "columns"]
)
def test_embeddings_however_they_are_divided(options: tuple[object, ...], finished: Finished) -> None:
    check_equal(verify_logits(*finished(CHECKPOINTS["gpt"], "--tp", 2, *options)))


def test_per_layer_keys(tmp_path: Path) -> None:
    model = small_model(LLAMA, scale=0.15)
    checkpoint = write_torch_dist(tmp_path / "checkpoint", model.per_layer(), args=model.args)
    check_equal(verify_logits(checkpoint, export(checkpoint, tmp_path / "out")))


@pytest.mark.parametrize("target", [TP2, HF], ids=["trtllm", "hf"])
def test_what_rounding_costs_is_told_apart_from_what_rules_do(target: tuple[object, ...], tmp_path: Path) -> None:
    if target == HF:
        pytest.importorskip("transformers")
    model = small_model(NEMOTRON, dtype=torch.float32, scale=0.15)
    checkpoint = write_torch_dist(tmp_path / "checkpoint", model.tensors, args=model.args)
    report = verify_logits(checkpoint, export(checkpoint, tmp_path / "out", *target))
    check_equal(report)
    assert report.roundings[0] == "weights were stored as float32 and exported as bfloat16"
    assert ("1 + norm weight was rounded to bfloat16" in report.roundings) == (target == TP2)
    assert report.from_training is not None
    assert 1e-3 < report.from_training.relative_difference < BF16
    assert "from the model as trained: largest" in str(report)


def test_given_tokens_are_the_ones_that_are_run(finished: Finished, tmp_path: Path) -> None:
    checkpoint, output = finished(CHECKPOINTS["llama"], *TP1)
    (tmp_path / "tokens").write_text("3, 4 5\n\n249 0 1\n")
    tokens = read_tokens(tmp_path / "tokens")
    assert tokens == [[3, 4, 5], [249, 0, 1]]
    report = verify_logits(checkpoint, output, tokens=tokens)
    check_equal(report)
    assert report.difference.num_tokens == 6
    assert verify_logits(checkpoint, output, num_tokens=5, seed=1) != verify_logits(checkpoint, output, num_tokens=5)
    with pytest.raises(ExportError, match=r"token ids \[250\] are outside the vocabulary of 250"):
        verify_logits(checkpoint, output, tokens=[[250]])
    with pytest.raises(ExportError, match=r"must have one length above 0, these have \[1, 2\]"):
        verify_logits(checkpoint, output, tokens=[[1], [1, 2]])
    (tmp_path / "tokens").write_text("a b")
    with pytest.raises(ExportError, match="cannot be read as lines of token ids"):
        read_tokens(tmp_path / "tokens")


def test_the_process_is_left_as_it_was(finished: Finished, tmp_path: Path) -> None:
    checkpoint, output = finished(CHECKPOINTS["llama"], *TP1)
    before = (torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.Stream, torch.get_default_device())
    verify_logits(checkpoint, output, num_tokens=2)
    after = (torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.Stream, torch.get_default_device())
    assert after == before
    assert not torch.distributed.is_initialized()


def test_a_folder_that_is_no_export_is_refused(finished: Finished, tmp_path: Path) -> None:
    checkpoint, _ = finished(CHECKPOINTS["llama"], *TP1)
    with pytest.raises(ExportError, match=r"config\.json: cannot be read"):
        verify_logits(checkpoint, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    with pytest.raises(ExportError, match="has neither mapping"):
        verify_logits(checkpoint, tmp_path)


def traces(values: torch.Tensor, other: torch.Tensor) -> tuple[Trace, Trace]:
    reference, candidate = Trace(logits=values), Trace(logits=other)
    reference.record(Point(LAYER_OUTPUT, 0), values)
    candidate.record(Point(LAYER_OUTPUT, 0), other)
    return reference, candidate


def test_the_figures_of_a_known_difference() -> None:
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    shifted = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    report = compare_logits(*traces(logits, shifted))
    difference = report.difference
    assert (difference.num_tokens, difference.max_difference, difference.mean_difference) == (2, 1, 0.25)
    assert difference.relative_difference == pytest.approx(1.0)  # the standard deviation of 0, 0, 2, 0
    expected = 0.5 * (torch.log(torch.tensor(0.5)) * 2 - torch.tensor([0.0, 1.0]).log_softmax(0).sum())
    assert difference.kl_max == pytest.approx(float(expected))
    assert difference.kl_mean == pytest.approx(float(expected) / 2)
    assert difference.top1_agreement == 0.5
    assert not report.agrees


def test_nan_never_agrees() -> None:
    logits = torch.randn(1, 3, 5)
    broken = logits.clone()
    broken[0, 1, 2] = float("nan")
    report = compare_logits(*traces(logits, broken))
    assert not report.agrees
    assert report.difference.max_difference == float("inf")
    assert "differ from layer 0, output (inf)" in str(report)
    assert not structs.replace(report, states=()).agrees


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ExportError, match="the export's vocabulary has 4 entries, the checkpoint's model 5"):
        compare_logits(Trace(logits=torch.zeros(1, 2, 5)), Trace(logits=torch.zeros(1, 2, 4)))
