"""Generation: the same tokens from either target and layout, and those that transformers itself generates."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import model_runner
from support.tokenizers import save_tokenizer

from dist_export.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

PROMPT = "5,9,14,33"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def exports(megatron_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trtllm/ (tp 2, pp 2) and hf/ of one Llama, the latter with a tokenizer."""
    folder = tmp_path_factory.mktemp("exports")
    tokenizer, source = save_tokenizer(folder / "tokenizer"), str(megatron_checkpoint(tp=2, pp=2))
    options = ["--num-processes", "1", "--vocab-size", "250"]
    assert main(["export", source, str(folder / "trtllm"), "--tp", "2", "--pp", "2", *options]) == 0
    assert main(["export", source, str(folder / "hf"), "--target", "hf", "--tokenizer", str(tokenizer), *options]) == 0
    return folder


@pytest.fixture
def generated(exports: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """What a command line generates, as JSON."""

    def run(name: str, *arguments: object) -> Any:
        capsys.readouterr()
        assert main(["generate", str(exports / name), *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_targets_agree(exports: Path, generated: Run) -> None:
    """At temperature 0, with each other and with transformers' own loop."""
    ours = {name: generated(name, "--tokens", PROMPT, "--max-new-tokens", 8) for name in ("trtllm", "hf")}
    model = transformers.AutoModelForCausalLM.from_pretrained(exports / "hf", dtype=torch.float32)
    prompt = [int(word) for word in PROMPT.split(",")]
    full = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=0)
    expected = full[0, len(prompt) :].tolist()
    assert ours["trtllm"]["results"][0]["new_tokens"] == expected
    assert ours["hf"]["results"][0]["new_tokens"] == expected
    assert {name: each["runner"] for name, each in ours.items()} == {
        "trtllm": "TensorRT-LLM reference interpreter",
        "hf": "transformers",
    }


def test_texts(exports: Path, generated: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer lies in the Hugging Face export and is named for the other."""
    asked = ("--prompt", "the cat sat", "--max-new-tokens", 5)
    found = generated("hf", *asked)["results"][0]
    assert found["tokens"] == [2, 3, 4]
    words = transformers.AutoTokenizer.from_pretrained(exports / "hf").decode(found["new_tokens"])
    assert found["text"] == words
    assert generated("trtllm", *asked, "--tokenizer", exports / "tokenizer")["results"][0] == found
    assert main(["generate", str(exports / "hf"), *map(str, asked)]) == 0
    assert capsys.readouterr().out == f"the cat sat{words}\n"


def test_drawn_tokens_follow_the_seed(generated: Run) -> None:
    drawn = [
        generated("trtllm", "--tokens", PROMPT, "--temperature", 1.5, "--seed", seed, "--max-new-tokens", 5)
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_where_it_ends(generated: Run) -> None:
    """At the stop token, which is not shown, and at the model's last position."""
    free = generated("trtllm", "--tokens", PROMPT, "--max-new-tokens", 6)["results"][0]["new_tokens"]
    stopped = generated("trtllm", "--tokens", PROMPT, "--max-new-tokens", 6, "--stop-token", free[2])
    assert stopped["results"][0]["new_tokens"] == free[: free.index(free[2])]
    long = generated("hf", "--tokens", " ".join(["7"] * 62), "--max-new-tokens", 9, "--stop-token", 249)
    assert len(long["results"][0]["new_tokens"]) == 2


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("trtllm", ["--prompt", "the cat"], "has no tokenizer; give --tokenizer DIR, or token ids with --tokens"),
        ("hf", ["--tokens", "1 250"], r"token ids [250] are outside the vocabulary of 250"),
        ("hf", ["--tokens", ""], "the prompt: is empty"),
        ("hf", ["--tokens", "a"], "expected token ids divided by commas or spaces"),
        ("hf", ["--tokens", "1", "--temperature", "-1"], "must not be below 0"),
        ("hf", ["--tokens", " ".join(["1"] * 65)], "the prompt has 65 tokens, the model sees 64 at once"),
        ("tokenizer", ["--tokens", "1"], "config.json: cannot be read"),
        (".", ["--tokens", "1"], "holds several exports; name one of trtllm, hf in it"),
    ],
)
def test_bad_input(
    name: str, arguments: list[str], message: str, exports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(exports / name), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_engines_need_tensorrt_llm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank0.engine").touch()
    assert main(["generate", str(tmp_path), "--tokens", "1"]) == 2
    assert "TensorRT-LLM, which is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize("release", model_runner.RELEASES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_engine_is_called_as_it_takes_it(
    release: str,
    temperature: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No engine runs here: a stand-in with the parameters of TensorRT-LLM's own ModelRunner, recorded from its public
    source, takes the calls. What it proves are the calls and what is made of the answer, not the tokens."""
    runner = model_runner.StandIn(release, [7, 8, 3, 9])
    for name, module in runner.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "rank0.engine").touch()
    asked = ["--tokens", "1 2", "--tokens", "5", "--max-new-tokens", "6", "--stop-token", "3", "--seed", "4", "--json"]
    assert main(["generate", str(tmp_path), *asked, "--temperature", str(temperature)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runner"] == "TensorRT-LLM engine"
    assert [each["new_tokens"] for each in found["results"]] == [[7, 8], [7, 8]]
    (opened, (_, call), _) = runner.calls
    assert opened == ("from_dir", {"engine_dir": str(tmp_path), "rank": 0})
    sampling = {"top_k": 1} if temperature == 0 else {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
    fixed = {"max_new_tokens": 6, "end_id": 3, "pad_id": 3, "random_seed": 4}
    assert call["kwargs"] == fixed | sampling


def test_other_ranks_of_an_engine_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every rank of mpirun runs the engine (here the stand-in), rank 0 prints."""
    runner = model_runner.StandIn(model_runner.RELEASES[0], [7], rank=1)
    for name, module in runner.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "rank0.engine").touch()
    assert main(["generate", str(tmp_path), "--tokens", "1"]) == 0
    assert capsys.readouterr().out == ""
    assert runner.calls[0] == ("from_dir", {"engine_dir": str(tmp_path), "rank": 1})
    assert runner.calls[1][1]["kwargs"]["end_id"] == -1


@pytest.mark.parametrize("target", ["trtllm", "hf"])
@pytest.mark.parametrize("scheme", ["fp8", "int8_sq", "int4_awq", "nvfp4"])
def test_quantised_weights_are_decoded(
    scheme: str, target: str, quantized_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The decoded weights are near those of the checkpoint: times the factor of activations where there is one."""
    from support.quantized import read

    from dist_export.generate_runners import open_export

    folder = tmp_path / "out"
    source = quantized_checkpoints[scheme]
    assert main(["export", str(source), str(folder), "--target", target, "--num-processes", "1"]) == 0
    tensors, _, _ = read(source / "iter_0000010")
    proj = "decoder.layers.0.self_attention.linear_proj."
    factor = tensors.get(f"{proj}input_quantizer._pre_quant_scale", torch.ones(()))
    expected = tensors[f"{proj}weight"].float() * factor.float()
    found = _attention_output(folder)
    assert found.shape == expected.shape
    half_steps = {"fp8": 1 / 16, "int8_sq": 1 / 64, "int4_awq": 1 / 14, "nvfp4": 3 / 16}
    assert ((found - expected).abs().max() / expected.abs().max()) < half_steps[scheme]
    logits = open_export(folder).logits(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 250)
    assert bool(torch.isfinite(logits).all())


def _attention_output(folder: Path) -> Any:
    from dist_export.verify.decoding import decoded_state

    state = decoded_state(folder)
    names = ("transformer.layers.0.attention.dense.weight", "model.layers.0.self_attn.o_proj.weight")
    return next(state[name] for name in names if name in state).float()
