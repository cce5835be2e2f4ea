"""``dist-export evaluate``: perplexity and ROUGE of an export, beside those of the checkpoint's own model.

Importing this module imports torch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct, field

from dist_export import api, texts
from dist_export.errors import ExportError
from dist_export.generate import generate, tokenizer_of
from dist_export.generate_runners import Runner, open_checkpoint_model, open_export
from dist_export.generation_options import GenerationOptions
from dist_export.runtime import exit_codes
from dist_export.texts import Sample

ROUGE = ("rouge1", "rouge2", "rougeL")


class Scores(Struct, frozen=True):
    """Of one model."""

    runner: str
    perplexity: float
    """exp of the mean negative log-likelihood of every token but the first of each text."""
    num_tokens: int
    rouge: Mapping[str, float] = field(default_factory=dict)
    """Mean F measure by kind; empty where no summaries were written."""


class Evaluation(Struct, frozen=True):
    """An export's scores and what they are measured against."""

    export: Scores
    checkpoint: Scores | None = None
    failures: tuple[str, ...] = ()

    @property
    def perplexity_ratio(self) -> float | None:
        """The export's over the checkpoint's; None without a checkpoint."""
        return None if self.checkpoint is None else self.export.perplexity / self.checkpoint.perplexity

    def to_json(self) -> str:
        """All numbers."""
        sides = {"export": self.export, "checkpoint": self.checkpoint}
        plain: dict[str, object] = {
            name: None
            if side is None
            else {"runner": side.runner, "perplexity": side.perplexity, "num_tokens": side.num_tokens}
            | {"rouge": dict(side.rouge)}
            for name, side in sides.items()
        }
        plain |= {"perplexity_ratio": self.perplexity_ratio, "passed": not self.failures}
        return json.dumps(plain | {"failures": list(self.failures)}, indent=1)

    def __str__(self) -> str:
        lines = []
        for name, side in (("export", self.export), ("checkpoint", self.checkpoint)):
            if side is not None:
                rouge = "".join(f"  {kind} {value:.4f}" for kind, value in side.rouge.items())
                of = f"{side.num_tokens} tokens, {side.runner}"
                lines.append(f"{name:10}  perplexity {side.perplexity:.4f}{rouge}  ({of})")
        if self.perplexity_ratio is not None:
            lines.append(f"perplexity ratio {self.perplexity_ratio:.6f}")
        lines += [f"FAILED: {text}" for text in self.failures]
        return "\n".join(lines)


def perplexity(runner: Runner, sequences: Sequence[list[int]], *, batch_size: int = 4) -> tuple[float, int]:
    """(perplexity, number of predicted tokens) of a model on token ids."""
    total, count = 0.0, 0
    for batch in texts.equal_lengths(sequences, batch_size):
        tokens = torch.tensor(batch)
        logits = runner.logits(tokens)[:, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        total, count = total + float(losses), count + tokens[:, 1:].numel()
    mean = total / count
    return (math.exp(mean) if mean < 700 else math.inf), count


def rouge(
    runner: Runner, samples: Sequence[Sample], tokenizer: Any, prompt: str, options: GenerationOptions
) -> dict[str, float]:
    """Mean ROUGE F measures of summaries that a model writes.

    `prompt` has ``{text}`` where the text goes; texts are cut so that the summary still fits.
    """
    try:
        scorer: Any = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(list(ROUGE), use_stemmer=True)
    except ImportError as error:
        raise ExportError("ROUGE is computed by rouge-score; run: pip install 'dist-export[evaluate]'") from error
    sums = dict.fromkeys(ROUGE, 0.0)
    for sample in samples:
        found = generate(runner, _prompt(sample, tokenizer, prompt, runner, options), options)
        scores = scorer.score(sample.summary, tokenizer.decode(found, skip_special_tokens=True))
        sums = {kind: value + scores[kind].fmeasure for kind, value in sums.items()}
    return {kind: value / len(samples) for kind, value in sums.items()}


def _prompt(sample: Sample, tokenizer: Any, prompt: str, runner: Runner, options: GenerationOptions) -> list[int]:
    before, _, after = prompt.partition("{text}")
    head = tokenizer(before + str(sample.text))["input_ids"]
    tail = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    room = runner.max_positions - options.max_new_tokens - len(tail)
    if room < 1:
        raise ExportError(f"--max-new-tokens {options.max_new_tokens}: leaves no room for a text")
    return [*head[:room], *tail]


def evaluate_command(options: argparse.Namespace) -> int:
    """Evaluate what a command line names; exit code 4 when a threshold is missed."""
    if options.max_perplexity_ratio is not None and options.checkpoint is None:
        raise ExportError("--max-perplexity-ratio: needs --checkpoint to compare with")
    if options.min_rouge_l is not None and not options.rouge:
        raise ExportError("--min-rouge-l: needs --rouge, which writes summaries")
    folder: Path = options.output
    samples = texts.read_samples(options.data, limit=options.num_samples, text_field=options.text_field)
    tokenizer = tokenizer_of(folder, options.tokenizer)
    if options.rouge and (tokenizer is None or not any(s.text and s.summary for s in samples)):
        raise ExportError("--rouge: needs a tokenizer (--tokenizer) and data with a text and a summary each")
    runner = open_export(folder)
    length = min(options.sequence_length, runner.max_positions)
    sequences = texts.token_ids(samples, tokenizer, vocab_size=runner.vocab_size, length=length)
    own = _scores(runner, sequences, samples, tokenizer, options)
    del runner
    reference = None
    for other in _reference(options):
        reference = _scores(other, sequences, samples, tokenizer, options)
    result = Evaluation(own, reference)
    result = Evaluation(own, reference, tuple(_failures(result, options)))
    print(result.to_json() if options.json else result)
    return exit_codes.NOT_VERIFIED if result.failures else exit_codes.OK


def _scores(
    runner: Runner,
    sequences: Sequence[list[int]],
    samples: Sequence[Sample],
    tokenizer: Any,
    options: argparse.Namespace,
) -> Scores:
    value, count = perplexity(runner, sequences, batch_size=options.batch_size)
    scores: dict[str, float] = {}
    if options.rouge:
        chosen = GenerationOptions(max_new_tokens=options.max_new_tokens, stop_token=tokenizer.eos_token_id)
        summarised = [sample for sample in samples if sample.text and sample.summary]
        scores = rouge(runner, summarised, tokenizer, options.summary_prompt, chosen)
    return Scores(runner.name, value, count, scores)


def _reference(options: argparse.Namespace) -> Iterator[Runner]:
    """The checkpoint's model, with what the export was told about its configuration; none when none is named."""
    if options.checkpoint is None:
        return
    from msgspec.structs import replace

    from dist_export.quantization import QuantizationOptions
    from dist_export.verify.files import read_manifest
    from dist_export.verify.run import source_from_manifest

    source = source_from_manifest(options.checkpoint, read_manifest(options.output))
    if source.base is not None or source.master_weights or source.mapping is not None:
        raise ExportError("--checkpoint: not for merged adapters, optimizer weights and exports made with --mapping")
    plain = QuantizationOptions(algorithm="none", kv_cache="none")
    with open_checkpoint_model(api.open_model(replace(source, quantization=plain, calibration=None))) as runner:
        yield runner


def _failures(result: Evaluation, options: argparse.Namespace) -> Iterator[str]:
    """Thresholds that are missed; NaN misses every one."""
    ratio, own = result.perplexity_ratio, result.export
    if options.max_perplexity is not None and not own.perplexity <= options.max_perplexity:
        yield f"perplexity {own.perplexity:.4f} is above {options.max_perplexity:g}"
    if options.max_perplexity_ratio is not None and ratio is not None and not ratio <= options.max_perplexity_ratio:
        yield f"perplexity ratio {ratio:.6f} is above {options.max_perplexity_ratio:g}"
    found = own.rouge.get("rougeL", math.nan)
    if options.min_rouge_l is not None and not found >= options.min_rouge_l:
        yield f"ROUGE-L {found:.4f} is below {options.min_rouge_l:g}"
