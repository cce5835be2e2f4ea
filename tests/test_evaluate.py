"""Evaluation: an export's perplexity beside Megatron's own, ROUGE of summaries, thresholds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers import save_tokenizer

from dist_export.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("megatron.core")

TEXTS = [
    {"article": "the cat sat on a mat and ran to the red house", "highlights": "the cat sat on a mat"},
    {"article": "a dog ran to the house and the cat sat on the dog", "highlights": "a dog ran to the house"},
]


@pytest.fixture(scope="module")
def checkpoint(megatron_checkpoint: Callable[..., Path]) -> Path:
    return megatron_checkpoint(tp=2, pp=2)


@pytest.fixture(scope="module")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trtllm, hf, and fp8 of one Llama, and data.jsonl."""
    folder = tmp_path_factory.mktemp("exports")
    options = ["--num-processes", "1"]
    tokenizer = ["--target", "hf", "--tokenizer", str(save_tokenizer(folder / "tokenizer"))]
    assert main(["export", str(checkpoint), str(folder / "trtllm"), "--tp", "2", *options]) == 0
    assert main(["export", str(checkpoint), str(folder / "hf"), *tokenizer, *options]) == 0
    asked = ["--quantization", "fp8_per_channel"]
    assert main(["export", str(checkpoint), str(folder / "fp8"), *asked, *options]) == 0
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return folder


def evaluated(exports: Path, name: str, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    """(exit code, JSON) of an evaluation on the texts."""
    capsys.readouterr()
    fixed = ["--data", exports / "data.jsonl", "--tokenizer", exports / "tokenizer", "--json"]
    code = main(["evaluate", str(exports / name), *map(str, (*fixed, *arguments))])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["trtllm", "hf"])
def test_perplexity_is_megatrons(
    name: str, exports: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of weights that are not rounded; and equal to what transformers' own loss says."""
    code, found = evaluated(exports, name, capsys, "--checkpoint", checkpoint, "--max-perplexity-ratio", "1.00001")
    assert (code, found["passed"]) == (0, True)
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert found["checkpoint"]["runner"] == "Megatron-Core"
    tokenizer = transformers.AutoTokenizer.from_pretrained(exports / "tokenizer")
    model = transformers.AutoModelForCausalLM.from_pretrained(exports / "hf", dtype=torch.float32)
    total, count = 0.0, 0
    for row in TEXTS:
        ids = torch.tensor([tokenizer(row["article"])["input_ids"]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["export"]["num_tokens"] == count
    assert found["export"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_fp8_is_within_a_bound(exports: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights with four significant bits change a model's perplexity by less than a twentieth, and by something."""
    code, found = evaluated(exports, "fp8", capsys, "--checkpoint", checkpoint, "--max-perplexity-ratio", "1.05")
    assert code == 0
    assert 1e-5 < abs(found["perplexity_ratio"] - 1) < 0.05


def test_missed_thresholds(exports: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("--max-perplexity", 2, "--max-perplexity-ratio", 0.5)
    code, found = evaluated(exports, "hf", capsys, "--checkpoint", checkpoint, *limits)
    assert (code, found["passed"], len(found["failures"])) == (4, False, 2)
    assert main(["evaluate", str(exports / "hf"), "--data", str(exports / "data.jsonl"), "--max-perplexity", "2"]) == 4
    shown = capsys.readouterr().out
    assert "export      perplexity " in shown
    assert "FAILED: perplexity " in shown


def test_rouge(exports: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same summaries from both targets and from Megatron, scored as the library scores them."""
    pytest.importorskip("rouge_score")
    asked = ("--rouge", "--max-new-tokens", 3, "--summary-prompt", "{text} and", "--checkpoint", checkpoint)
    results = [evaluated(exports, name, capsys, *asked)[1] for name in ("trtllm", "hf")]
    scores = [result[side]["rouge"] for result in results for side in ("export", "checkpoint")]
    assert all(each == scores[0] for each in scores)
    assert scores[0].keys() == {"rouge1", "rouge2", "rougeL"}
    code, found = evaluated(exports, "trtllm", capsys, *asked[:5], "--min-rouge-l", 0.99)
    assert code == 4
    assert found["failures"] == [f"ROUGE-L {scores[0]['rougeL']:.4f} is below 0.99"]


def test_rouge_of_a_right_summary(exports: Path) -> None:
    """A model that answers with the reference scores 1."""
    pytest.importorskip("rouge_score")
    from dist_export.evaluate import rouge
    from dist_export.generate_runners import Runner
    from dist_export.generation_options import GenerationOptions
    from dist_export.texts import Sample, load_tokenizer

    tokenizer = load_tokenizer(exports / "tokenizer")
    sample = Sample(text=TEXTS[0]["article"], summary=TEXTS[0]["highlights"])
    start, answer = len(tokenizer(sample.text)["input_ids"]), [*tokenizer(sample.summary)["input_ids"], 1]

    def logits(tokens: Any) -> Any:
        wanted = answer[tokens.shape[1] - start]
        return torch.nn.functional.one_hot(torch.tensor([[wanted]]), 250).float().expand(1, tokens.shape[1], 250)

    options = GenerationOptions(max_new_tokens=20, stop_token=1)
    found = rouge(Runner("answers", 250, 64, logits), [sample], tokenizer, "{text}", options)
    assert found == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-perplexity-ratio", "1"], "--max-perplexity-ratio: needs --checkpoint"),
        (["--min-rouge-l", "0.1"], "--min-rouge-l: needs --rouge"),
        (["--rouge"], "--rouge: needs a tokenizer (--tokenizer) and data with a text and a summary each"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "ids.txt"
    data.write_text("1 2 3\n4,5,6\n")
    assert main(["evaluate", str(exports / "trtllm"), "--data", str(data), *arguments]) == 2
    assert message in capsys.readouterr().err
