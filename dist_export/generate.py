"""``dist-export generate``: what an export continues a prompt with, whichever target it is for.

Importing this module imports torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_export import texts
from dist_export.errors import ExportError
from dist_export.generate_engine import generate_with_engine, is_engine
from dist_export.generate_runners import Runner, open_export
from dist_export.generation_options import GenerationOptions
from dist_export.runtime import exit_codes


def generate(runner: Runner, prompt: Sequence[int], options: GenerationOptions) -> list[int]:
    """The token ids that follow `prompt`, at most as many as asked and as the model has positions for.

    The stop token is not among them. Raises `ExportError` for an empty prompt and for ids outside the vocabulary.
    """
    wrong = [token for token in prompt if not 0 <= token < runner.vocab_size]
    if wrong or not prompt:
        problem = f"token ids {wrong[:5]} are outside the vocabulary of {runner.vocab_size}" if wrong else "is empty"
        raise ExportError(f"the prompt: {problem}")
    if len(prompt) > runner.max_positions:
        raise ExportError(f"the prompt has {len(prompt)} tokens, the model sees {runner.max_positions} at once")
    if options.temperature < 0:
        raise ExportError(f"--temperature {options.temperature}: must not be below 0")
    tokens, generator = list(prompt), torch.Generator().manual_seed(options.seed)
    while len(tokens) - len(prompt) < options.max_new_tokens and len(tokens) < runner.max_positions:
        token = _next(runner.logits(torch.tensor([tokens]))[0, -1], options.temperature, generator)
        if token == options.stop_token:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _next(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if not bool(torch.isfinite(logits).all()):
        raise ExportError("the model's logits are NaN or infinite; run `dist-export verify --logits`")
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.double() / temperature).softmax(-1), 1, generator=generator))


def tokenizer_of(folder: Path, given: Path | None) -> Any:
    """The tokenizer that was named, or that lies in the export; None when there is neither."""
    if given is not None:
        return texts.load_tokenizer(given)
    return texts.load_tokenizer(folder) if texts.has_tokenizer(folder) else None


def generate_command(options: argparse.Namespace) -> int:
    """Generate what a command line asks for."""
    folder: Path = options.output
    tokenizer = tokenizer_of(folder, options.tokenizer)
    if options.prompt and tokenizer is None:
        raise ExportError(f"{folder}: has no tokenizer; give --tokenizer DIR, or token ids with --tokens")
    prompts = [tokenizer(text)["input_ids"] for text in options.prompt or []] or [_ids(text) for text in options.tokens]
    stop = options.stop_token
    if stop is None and tokenizer is not None:
        stop = tokenizer.eos_token_id
    chosen = GenerationOptions(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed, stop_token=stop
    )
    if is_engine(folder):
        name, continued = "TensorRT-LLM engine", generate_with_engine(folder, prompts, chosen)
    else:
        runner = open_export(folder)
        name, continued = runner.name, [generate(runner, prompt, chosen) for prompt in prompts]
    results = []
    for number, new in enumerate(continued or []):
        text = None if tokenizer is None else tokenizer.decode(new)
        prompt_text = options.prompt[number] if options.prompt else None
        if not options.json:
            shown = text if text is not None else " ".join(map(str, new))
            print(shown if prompt_text is None else f"{prompt_text}{shown}")
        results.append({"prompt": prompt_text, "tokens": list(prompts[number]), "new_tokens": new, "text": text})
    if options.json and continued is not None:
        print(json.dumps({"runner": name, "results": results}, indent=1))
    return exit_codes.OK


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise ExportError(f"--tokens {text}: expected token ids divided by commas or spaces") from error
