"""Whether an export computes what the checkpoint's model computes: logits and hidden states, side by side.

The checkpoint runs in Megatron-Core's own GPTModel, a TensorRT-LLM export in a reference interpreter, a Hugging Face
export in transformers, all in float32 on the CPU, so that what is left of a difference is rounding. This is the witness
of the rule tables: rebuilding a checkpoint from an export proves that a rule was carried out, not that it is right.

Importing this module imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_export.checkpoint.open import Checkpoint, open_checkpoint
from dist_export.errors import ExportError
from dist_export.models.catalog import SourceCatalog
from dist_export.models.config import ModelConfig
from dist_export.models.resolve import resolve_config
from dist_export.verify import trace as at
from dist_export.verify.trace import Point, Trace

EXACT = 1e-3
"""Largest relative difference of two float32 computations with equal weights. Small models show 6e-6 whatever the
layout; the error of a sum grows with its length and the number of layers, and a wrong rule shows 1e-1 and more."""
ROUNDED = 3e-2
"""The same where the export rounds weights to 16 bits (relative error 2^-9 each) or its consumer approximates."""

DEFAULT_NUM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class StateDifference:
    """How far a hidden state is from the reference's."""

    point: Point
    relative: float
    """Largest over tokens of |candidate - reference| / |reference|, of the state's vectors; infinite for NaN."""
    hint: str = ""
    """What the difference looks like, for the first state that is too far off."""
    source: str = ""
    """The export's tensors that make this state."""


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """An export's logits against the reference's, over all tokens and the true vocabulary."""

    num_tokens: int
    max_difference: float
    mean_difference: float
    relative_difference: float
    """The largest difference over the standard deviation of the reference's logits."""
    kl_mean: float
    """KL(reference || candidate) per token, in nats."""
    kl_max: float
    top1_agreement: float
    """Share of tokens for which both rank the same token first."""
    states: tuple[StateDifference, ...]
    """In the order of computation; those that both sides have."""
    tolerance: float
    notes: tuple[str, ...] = ()
    """Why the tolerance is not that of exact weights."""

    @property
    def agrees(self) -> bool:
        """Logits and every hidden state are within the tolerance."""
        return self.relative_difference <= self.tolerance and self.first_difference is None

    @property
    def first_difference(self) -> StateDifference | None:
        """The first hidden state that is too far off: where the fault is."""
        return next((state for state in self.states if state.relative > self.tolerance), None)

    def __str__(self) -> str:
        lines = [
            f"logits over {self.num_tokens} tokens: largest difference {self.max_difference:.3g} "
            f"({self.relative_difference:.2g} of their spread), mean {self.mean_difference:.3g}, "
            f"KL mean {self.kl_mean:.3g}, largest {self.kl_max:.3g}, same first token {self.top1_agreement:.1%}",
            *(f"tolerance {self.tolerance:g}: {note}" for note in self.notes),
        ]
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        first = self.first_difference
        if first is None:
            return "logits agree" if self.agrees else self._differ("hidden states agree, so the output layer is wrong")
        layer, place = first.point.layer, f"{first.point.name} ({first.relative:.2g})"
        if layer is None:
            text = f"the {place} differs" + ("" if first.point.name == at.EMBEDDING else ", all layers before agree")
        else:
            before = "the embedding agrees" if layer == 0 else f"hidden states agree up to layer {layer - 1}"
            text = f"{before}, differ from layer {layer}, {place}"
        text += f": {first.hint}" if first.hint else ""
        return self._differ(text + (f" [{first.source}]" if first.source else ""))

    @staticmethod
    def _differ(text: str) -> str:
        return f"logits DIFFER: {text}"


def compare_logits(
    reference: Trace, candidate: Trace, *, tolerance: float = EXACT, notes: Sequence[str] = ()
) -> LogitsReport:
    """Compare two runs of the same token ids. Raises `ExportError` when their logits do not have the same shape."""
    expected, actual = reference.logits, candidate.logits
    assert expected is not None, "the reference run has not finished"
    assert actual is not None, "the candidate run has not finished"
    if expected.shape != actual.shape:
        raise ExportError(
            f"the export's vocabulary has {actual.shape[-1]} entries, the checkpoint's model {expected.shape[-1]}; "
            "verify with the configuration that was exported"
        )
    expected, actual = expected.double(), actual.double()
    difference = (actual - expected).abs()
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return LogitsReport(
        num_tokens=difference[..., 0].numel(),
        max_difference=_number(difference.max()),
        mean_difference=_number(difference.mean()),
        relative_difference=_number(difference.max() / expected.std()),
        kl_mean=_number(divergence.mean()),
        kl_max=_number(divergence.max()),
        top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
        states=tuple(_compare_states(reference, candidate, tolerance)),
        tolerance=tolerance,
        notes=tuple(notes),
    )


def _number(value: torch.Tensor) -> float:
    """NaN counts as infinitely wrong, so that it never passes a comparison."""
    number = float(value)
    return math.inf if math.isnan(number) else number


def _compare_states(reference: Trace, candidate: Trace, tolerance: float) -> Iterator[StateDifference]:
    found = False
    for point, state in candidate.states.items():
        if point not in reference.states:
            continue
        expected = _repeated(reference.states[point], state)
        relative = _relative(expected, state)
        hint = ""
        if relative > tolerance and not found:
            found, hint = True, _hint(reference, point, expected, state, tolerance)
        yield StateDifference(point, relative, hint, candidate.sources.get(point, ""))


def _repeated(expected: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Key and value heads that the candidate repeats in a row, to fill more ranks than there are heads."""
    if state.dim() == 4 and state.shape[2] > expected.shape[2]:
        return expected.repeat_interleave(state.shape[2] // expected.shape[2], 2)
    return expected


def _relative(expected: torch.Tensor, state: torch.Tensor) -> float:
    if expected.shape != state.shape:
        return math.inf
    expected, state = expected.flatten(2).double(), state.flatten(2).double()
    size = expected.norm(dim=-1)
    return _number(((state - expected).norm(dim=-1) / size.clamp_min(1e-6 * float(size.max()) + 1e-30)).max())


def _hint(reference: Trace, point: Point, expected: torch.Tensor, state: torch.Tensor, tolerance: float) -> str:
    """What a difference looks like. Position 0 is not rotated, so it shows the weights alone."""
    if expected.shape != state.shape:
        return f"its shape is {list(state.shape)}, expected {list(expected.shape)}"
    first, expected_first = state[:, :1], expected[:, :1]
    if point.name in (at.QUERY, at.KEY) and _relative(expected_first, first) <= tolerance:
        return "right at position 0 and wrong after it: rotary base, percentage, scaling or pairing"
    for other, name in _others(reference, point):
        if other.shape == state.shape and _relative(other[:, :1], first) <= tolerance:
            return f"equals the reference's {name}: exchanged"
    if point.name in (at.ATTENTION_NORM, at.MLP_NORM, at.FINAL_NORM) and _is_normalized(state - expected):
        return "off by exactly the normalised input: the one of zero-centred norms was left out or added twice"
    heads, expected_heads = first.flatten(2), expected_first.flatten(2)
    if state.dim() == 4 and _relative(expected_first.sort(-1).values, first.sort(-1).values) <= tolerance:
        return "each head has its elements in another order: rotary halves interleaved?"
    if _relative(expected_heads.sort(-1).values, heads.sort(-1).values) <= tolerance:
        return "the right values in another order: heads or rows are permuted"
    return ""


def _others(reference: Trace, point: Point) -> Iterator[tuple[torch.Tensor, str]]:
    """The reference's states of the same layer, and the same state of the neighbouring layers."""
    for other, state in reference.states.items():
        if other != point and other.layer == point.layer:
            yield state, other.name
    for layer in () if point.layer is None else (point.layer - 1, point.layer + 1):
        neighbour = Point(point.name, layer)
        if neighbour in reference.states:
            yield reference.states[neighbour], str(neighbour)


def _is_normalized(vectors: torch.Tensor) -> bool:
    """Every token's vector has a root mean square of one, as only what a norm makes has."""
    return bool(((vectors.double().square().mean(-1).sqrt() - 1).abs() < 1e-2).all())


def verify_logits(
    checkpoint: Path,
    output: Path,
    *,
    tokens: Sequence[Sequence[int]] | None = None,
    num_tokens: int = DEFAULT_NUM_TOKENS,
    seed: int = 0,
    iteration: int | None = None,
    overrides: Mapping[str, tuple[object, str]] | None = None,
) -> LogitsReport:
    """Run token ids through a Megatron checkpoint and its export, and compare. Called in one process.

    `tokens` are sequences of equal length; without them one sequence of `num_tokens` random ids (at most what the
    model sees at once) is drawn from `seed`. `overrides` are those of the export (field -> value and where it was
    given). Needs megatron-core, and transformers for a Hugging Face folder.

    Raises `ExportError` when a side cannot be read or run; a difference is told by the report, not raised.
    """
    kind, dtype = _kind_of(output)
    opened = open_checkpoint(checkpoint, iteration=iteration)
    config = _model_config(opened, overrides or {})
    ids = _token_ids(config, tokens, num_tokens, seed)
    from dist_export.verify.megatron_adapter import run_megatron

    if kind == "trtllm":
        from dist_export.verify.trtllm_interpreter import run_trtllm as run
    else:
        from dist_export.verify.huggingface_adapter import run_huggingface as run
    candidate = run(output, ids)  # first: its faults are found sooner
    reference = run_megatron(opened.index, config, ids)
    notes = _rounding(opened, config, kind, dtype)
    return compare_logits(reference, candidate, tolerance=ROUNDED if notes else EXACT, notes=notes)


def _kind_of(output: Path) -> tuple[str, str]:
    """Which consumer an export folder is for, and the element type of its weights."""
    path = output / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read: {error}; give the folder of a finished export") from error
    if isinstance(config, dict) and "mapping" in config:
        return "trtllm", str(config.get("dtype"))
    if isinstance(config, dict) and "model_type" in config:
        return "hf", str(config.get("dtype", config.get("torch_dtype")))
    raise ExportError(f"{path}: has neither mapping (TensorRT-LLM) nor model_type (Hugging Face); not an export")


def _model_config(checkpoint: Checkpoint, overrides: Mapping[str, tuple[object, str]]) -> ModelConfig:
    catalog = SourceCatalog(checkpoint.index.shapes())
    resolved = resolve_config(
        arguments=checkpoint.arguments,
        shapes=catalog.folded_shapes(),
        num_layers_found=catalog.num_layers,
        overrides=overrides,
    )
    return resolved.config


def _token_ids(config: ModelConfig, tokens: Sequence[Sequence[int]] | None, num_tokens: int, seed: int) -> torch.Tensor:
    if tokens is None:
        length = min(num_tokens, config.max_position_embeddings, config.window_size or num_tokens)
        return torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    lengths = {len(sequence) for sequence in tokens}
    if len(lengths) != 1 or 0 in lengths:
        raise ExportError(f"token sequences must have one length above 0, these have {sorted(lengths)}")
    wrong = [token for sequence in tokens for token in sequence if not 0 <= token < config.vocab_size]
    if wrong:
        raise ExportError(f"token ids {wrong[:5]} are outside the vocabulary of {config.vocab_size}")
    return torch.tensor([list(sequence) for sequence in tokens])


def read_tokens(path: Path) -> list[list[int]]:
    """Token ids from a file: one sequence per line, ids divided by spaces or commas."""
    try:
        lines = path.read_text().replace(",", " ").splitlines()
        sequences = [[int(word) for word in line.split()] for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read as lines of token ids: {error}") from error
    if not sequences:
        raise ExportError(f"{path}: holds no token ids")
    return sequences


def _rounding(checkpoint: Checkpoint, config: ModelConfig, kind: str, dtype: str) -> list[str]:
    """Why this export cannot equal the checkpoint's model exactly, however right its rules are."""
    notes = []
    stored = {info.dtype for info in checkpoint.index.tensors.values()}
    if stored != {dtype}:
        notes.append(f"weights were stored as {', '.join(sorted(stored))} and exported as {dtype}")
    if config.zero_centered_norm and kind == "trtllm" and dtype != "float32":
        notes.append(f"1 + norm weight was rounded to {dtype}")
    if config.activation == "gelu" and kind == "trtllm":
        notes.append("the model has exact gelu, TensorRT-LLM computes its tanh form")
    return notes
