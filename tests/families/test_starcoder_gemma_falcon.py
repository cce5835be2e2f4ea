"""StarCoder, StarCoder2, Gemma, Gemma 2, Falcon: what they compute, who serves them, what is refused before a weight is
read. That their bytes are those of other converters is in tests/conformance."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.exports import config_of, export, run_command, tensors_of
from support.small_models import GPT, LLAMA, SmallModel, small_model
from support.torch_dist import megatron_chunks, write_torch_dist

CHECKPOINTS = Path(__file__).parents[1] / "conformance" / "checkpoints"
STARCODER2, STARCODER = CHECKPOINTS / "starcoder2_core_0_16_tp2", CHECKPOINTS / "starcoder_core_0_16_tp2"
GEMMA, GEMMA2 = CHECKPOINTS / "gemma_bridge_core_0_16_tp2", CHECKPOINTS / "gemma2_bridge_core_0_16_tp2"
FALCON_7B, FALCON_40B = (CHECKPOINTS / f"falcon_{size}_nemo1_core_0_16_tp2" for size in ("7b", "40b"))
MEASURED = 2e-5
"""Above what equal weights show in these models: 3e-6 of the logits' spread."""
TOKENS = [[(7 * i + 3 * row) % 60 for i in range(28)] for row in range(2)]
"""Longer than the windows of StarCoder2 (16) and Gemma 2 (8)."""


def refusal(*arguments: object) -> str:
    process = run_command("export", *arguments)
    assert process.returncode == 2, process.stdout
    return process.stderr


def difference(checkpoint: Path, output: Path, length: int = 28, **overrides: object) -> float:
    pytest.importorskip("megatron.core")
    from dist_export.verify.logits import verify_logits

    given = {field: (value, "the test") for field, value in overrides.items()}
    report = verify_logits(checkpoint, output, tokens=[row[:length] for row in TOKENS], overrides=given)
    assert report.agrees == (report.difference.relative_difference < MEASURED), str(report)
    return report.difference.relative_difference


@pytest.mark.parametrize(
    "checkpoint", [STARCODER2, STARCODER, GEMMA, GEMMA2, FALCON_7B, FALCON_40B], ids=lambda c: c.name
)
def test_what_transformers_computes(checkpoint, tmp_path):
    pytest.importorskip("transformers")
    assert difference(checkpoint, export(checkpoint, tmp_path / "out", "--target", "hf")) < MEASURED


@pytest.mark.parametrize(
    ("checkpoint", "layout", "length"),
    [
        (STARCODER2, (4, 1), 14),
        (STARCODER, (2, 2), 28),
        (GEMMA, (4, 1), 28),
        (GEMMA2, (2, 2), 7),
        (FALCON_7B, (4, 1), 28),
        (FALCON_40B, (2, 2), 28),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_tensorrt_llm_computes(checkpoint, layout, length, tmp_path):
    output = export(checkpoint, tmp_path / "out", "--tp", layout[0], "--pp", layout[1])
    assert difference(checkpoint, output, length) < MEASURED


def test_the_windows_of_gemma_2_are_in_every_second_layer(tmp_path):
    pytest.importorskip("transformers")
    swapped = export(GEMMA2, tmp_path / "out", "--target", "hf", "--set", "window_layers=0,1")
    assert config_of(swapped)["layer_types"] == ["full_attention", "sliding_attention"]
    assert difference(GEMMA2, swapped) > 1e-2
    assert difference(GEMMA2, swapped, window_layers=(0, 1)) < MEASURED


def test_tokens_beyond_a_window_that_the_checkpoint_cannot_say_are_refused(tmp_path):
    from dist_export.errors import ExportError

    output = export(STARCODER2, tmp_path / "out")
    with pytest.raises(ExportError, match="28 tokens are more than a window of 15, of which a TensorRT-LLM checkpoint"):
        difference(STARCODER2, output)


@pytest.mark.parametrize("checkpoint", [GEMMA, GEMMA2], ids=lambda c: c.name)
def test_gemma_shares_its_head_until_0_15(checkpoint, tmp_path):
    for layout, releases in ((("--tp", 2), "0.13 to 1.2"), (("--pp", 2), "0.16 to 1.2")):
        plan = run_command("plan", checkpoint, *layout)
        assert f"TensorRT-LLM {releases}" in plan.stdout, plan.stdout + plan.stderr
    text = refusal(checkpoint, tmp_path / "out", "--pp", 2, "--trtllm-version", "0.14")
    assert "a head that is the embedding cannot be on another stage (TensorRT-LLM 0.13 to 0.15)" in text
    assert "is in TensorRT-LLM 0.13 to 1.2, not in 0.12" in refusal(
        checkpoint, tmp_path / "out", "--trtllm-version", "0.12"
    )
    for choice in (("--no-parallel-embedding",), ("--embedding-sharding-dim", 1)):
        assert "always divides its embedding by vocabulary rows" in refusal(checkpoint, tmp_path / "out", *choice)
    assert not (tmp_path / "out").exists()


def test_the_head_of_gemma_is_its_embedding_on_every_rank(tmp_path):
    output = export(GEMMA2, tmp_path / "out", "--tp", 2)
    for rank in range(2):
        tensors = tensors_of(output / f"rank{rank}.safetensors")
        assert tensors["lm_head.weight"].equal(tensors["transformer.vocab_embedding.weight"])


def test_falcon_of_old_releases_has_one_rotary_base(tmp_path):
    text = refusal(FALCON_7B, tmp_path / "out", "--set", "rotary_base=500000", "--trtllm-version", "0.14")
    assert "a rotary base is not passed to its attention (TensorRT-LLM 0.12 to 0.14)" in text
    text = refusal(FALCON_7B, tmp_path / "out", "--set", "norm_epsilon=1e-6")
    assert "its last norm has an epsilon of 1e-5" in text


GEMMA_STYLE = LLAMA | {"swiglu": False, "gated_linear_unit": True, "bias_gelu_fusion": True}
GEMMA_STYLE |= {"apply_embedding_scaling": True, "layernorm_zero_centered_gamma": True}


def checkpoint_of(model: SmallModel, folder: Path) -> Path:
    return write_torch_dist(folder, model.tensors, args=model.args, chunks=megatron_chunks(tp=2))


def small_falcon(**args: object) -> SmallModel:
    """Norms are modules of their own in NeMo's Falcon."""
    model = small_model(GPT, scale=0.15, **{"position_embedding_type": "rope", "parallel_attention": True, **args})
    for fused, own in {"self_attention.linear_qkv": "input_layernorm.", "mlp.linear_fc1": "pre_mlp_layernorm."}.items():
        for kind in ("weight", "bias"):
            tensor = model.tensors.pop(f"decoder.layers.{fused}.layer_norm_{kind}")
            if own.startswith("input") or args.get("new_decoder_architecture"):
                model.tensors[f"decoder.layers.{own}{kind}"] = tensor
    return model


def small_gemma2(**args: object) -> SmallModel:
    """Without capping, and with every window."""
    model = small_model(GEMMA_STYLE, scale=0.15, **args)
    for name in ("self_attention.linear_proj", "mlp.linear_fc2"):
        norms = model.tensors["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
        model.tensors[f"decoder.layers.{name}.post_layernorm.weight"] = norms.flip(0) * 2
    return model


PLAIN = GPT | {"add_bias_linear": False}
VARIANTS = {
    "falcon, old decoder without grouping": small_falcon(add_bias_linear=False, num_query_groups=4),
    "falcon, one norm and grouped queries": small_falcon(add_bias_linear=False),
    "starcoder2, no biases, tied, exact gelu": small_model(
        PLAIN, scale=0.15, position_embedding_type="rope", untie_embeddings_and_output_weights=False
    ),
    "starcoder, untied": small_model(GPT, scale=0.15, num_query_groups=1),
    "gemma, untied": small_model(GEMMA_STYLE, scale=0.15),
    "gemma2, no windows, no caps": small_gemma2(),
    "gemma2, windows in all layers": small_gemma2(window_size=[7, 0]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tmp_path):
    pytest.importorskip("transformers")
    checkpoint = checkpoint_of(VARIANTS[variant], tmp_path / "checkpoint")
    output = export(checkpoint, tmp_path / "out", "--target", "hf", "--target", "trtllm", "--tp", 2)
    family = variant.split(",")[0]
    assert config_of(output / "hf")["model_type"] == {"starcoder": "gpt_bigcode"}.get(family, family)
    for target in ("hf", "trtllm"):
        assert difference(checkpoint, output / target, 28 if target == "hf" else 7) < MEASURED


def test_biases_of_parallel_layers_are_added_once(tmp_path):
    """The all-reduce of attention and MLP together adds what every rank has."""
    pytest.importorskip("transformers")
    checkpoint = checkpoint_of(small_falcon(new_decoder_architecture=True), tmp_path / "checkpoint")
    output = export(checkpoint, tmp_path / "out", "--tp", 2)
    assert difference(checkpoint, output) < MEASURED
    assert difference(checkpoint, export(checkpoint, tmp_path / "hf", "--target", "hf")) < MEASURED
    for name in ("attention.dense", "mlp.proj"):
        first, second = (tensors_of(output / f"rank{r}.safetensors") for r in range(2))
        assert first[f"transformer.layers.0.{name}.bias"].any()
        assert not second[f"transformer.layers.0.{name}.bias"].any()
    verified = run_command("verify", checkpoint, output)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "own parallel layers leave them out" in run_command("plan", checkpoint).stdout
    assert "leave them out" not in run_command("plan", FALCON_40B).stdout
