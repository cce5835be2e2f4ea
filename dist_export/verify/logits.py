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
from pathlib import Path

import torch
from msgspec import Struct
from msgspec.structs import replace

from dist_export.checkpoint.open import Checkpoint, open_checkpoint
from dist_export.errors import ExportError
from dist_export.models.catalog import SourceCatalog
from dist_export.models.config import ModelConfig
from dist_export.models.resolve import resolve_config
from dist_export.verify import trace as at
from dist_export.verify.trace import Point, Trace

TOLERANCE = 1e-3
"""Largest relative difference of two float32 computations with equal weights. Small models show at most 6e-6 whatever
the layout; the error grows with the length of sums and the number of layers, and wrong rules show 1e-1 and more."""

DEFAULT_NUM_TOKENS = 64


class StateDifference(Struct, frozen=True):
    """How far a hidden state is from the reference's."""

    point: Point
    relative: float
    """Largest over tokens of |candidate - reference| / |reference|, of the state's vectors; infinite for NaN."""
    hint: str = ""
    """What the difference looks like, for the first state that is too far off."""
    source: str = ""
    """The export's tensors that make this state."""


class LogitsDifference(Struct, frozen=True):
    """An export's logits against a reference's, over all tokens and the true vocabulary."""

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

    def __str__(self) -> str:
        return (
            f"largest {self.max_difference:.3g} ({self.relative_difference:.2g} of their spread), mean "
            f"{self.mean_difference:.3g}, KL mean {self.kl_mean:.2g}, largest {self.kl_max:.2g}, same first token "
            f"{self.top1_agreement:.1%} of {self.num_tokens}"
        )


class LogitsReport(Struct, frozen=True):
    """Whether an export computes the checkpoint's model, and where it stops doing so."""

    difference: LogitsDifference
    """Against Megatron-Core's logits, its weights rounded as the export's."""
    states: tuple[StateDifference, ...]
    """In the order of computation; those that both sides have."""
    tolerance: float = TOLERANCE
    roundings: tuple[str, ...] = ()
    """In what the export and its consumer round or approximate the model."""
    from_training: LogitsDifference | None = None
    """Against the model as trained: what the roundings cost. None when there are none."""

    @property
    def agrees(self) -> bool:
        """Logits and every hidden state are within the tolerance."""
        return self.difference.relative_difference <= self.tolerance and self.first_difference is None

    @property
    def first_difference(self) -> StateDifference | None:
        """The first hidden state that is too far off: where the fault is."""
        return next((state for state in self.states if state.relative > self.tolerance), None)

    def __str__(self) -> str:
        lines = [self._verdict(), f"difference of logits: {self.difference}"]
        if self.from_training is not None:
            lines += [f"from the model as trained: {self.from_training}", *(f"  {text}" for text in self.roundings)]
        return "\n".join(lines)

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


def compare_logits(reference: Trace, candidate: Trace, *, tolerance: float = TOLERANCE) -> LogitsReport:
    """Compare two runs of the same token ids. Raises `ExportError` when their logits do not have the same shape."""
    return LogitsReport(
        logits_difference(reference, candidate), tuple(_compare_states(reference, candidate, tolerance)), tolerance
    )


def logits_difference(reference: Trace, candidate: Trace) -> LogitsDifference:
    """How far two runs' logits are from each other. Raises `ExportError` when they do not have the same shape."""
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
    return LogitsDifference(
        num_tokens=difference[..., 0].numel(),
        max_difference=_number(difference.max()),
        mean_difference=_number(difference.mean()),
        relative_difference=_number(difference.max() / expected.std()),
        kl_mean=_number(divergence.mean()),
        kl_max=_number(divergence.max()),
        top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
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
    if _relative(expected_heads, heads) < 10 * tolerance:
        return ""
    if point.name in (at.QUERY, at.KEY) and _relative(expected_first.sort(-1)[0], first.sort(-1)[0]) <= tolerance:
        return "each head has its elements in another order: rotary halves are interleaved"
    if _relative(expected_heads.sort(-1)[0], heads.sort(-1)[0]) <= tolerance:
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

    Where the export rounds (16-bit weights, the one added to norms) or its consumer approximates (gelu), states are
    compared with a second reference run that rounds the same, so that a wrong rule cannot hide behind rounding; what
    the rounding costs is reported beside it.

    Raises `ExportError` when a side cannot be read or run; a difference is told by the report, not raised.
    """
    kind, dtype = _kind_of(output)
    opened = open_checkpoint(checkpoint, iteration=iteration)
    if opened.adapters is not None:
        raise ExportError(f"{checkpoint}: holds adapters, which Megatron's own model is not given; use rebuild instead")
    config = _model_config(opened, overrides or {})
    ids = _token_ids(config, tokens, num_tokens, seed)
    if kind == "trtllm" and config.window_size is not None and ids.shape[1] > config.window_size:
        raise ExportError(
            f"{ids.shape[1]} tokens are more than a window of {config.window_size}, of which a TensorRT-LLM checkpoint "
            "does not know; give fewer"
        )
    from dist_export.verify.megatron_adapter import run_megatron
    from dist_export.verify.megatron_weights import Rounding

    if kind == "trtllm":
        from dist_export.verify.trtllm_interpreter import run_trtllm as run
    else:
        from dist_export.verify.huggingface_adapter import run_huggingface as run
    candidate = run(output, ids)  # first: its faults are found sooner
    reference = run_megatron(opened.index, config, ids)
    roundings = _roundings(opened, config, kind, dtype)
    if not roundings:
        return compare_logits(reference, candidate)
    from_training = logits_difference(reference, candidate)
    rounding = Rounding(
        getattr(torch, dtype),
        stores_one=kind == "trtllm",
        keeps_router=kind == "trtllm",
        qk_norm_epsilon=ENGINE_QK_NORM_EPSILON if _replaces_epsilon(config, kind) else None,
        absorbs_keys=_absorbs_keys(config, kind),
    )
    approximated = replace(config, activation="gelu_tanh") if _approximates_gelu(config, kind) else config
    del reference
    report = compare_logits(run_megatron(opened.index, approximated, ids, rounding=rounding), candidate)
    return replace(report, roundings=tuple(roundings), from_training=from_training)


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


def _approximates_gelu(config: ModelConfig, kind: str) -> bool:
    return config.activation == "gelu" and kind == "trtllm"


ENGINE_QK_NORM_EPSILON = 1e-5
"""TensorRT-LLM's attention layer norms queries and keys with its own default (layers/attention.py)."""


def _replaces_epsilon(config: ModelConfig, kind: str) -> bool:
    own = kind == "trtllm" and not config.kv_lora_rank  # norms of latents have the model's
    return config.qk_norm and own and config.norm_epsilon != ENGINE_QK_NORM_EPSILON


def _absorbs_keys(config: ModelConfig, kind: str) -> bool:
    return kind == "trtllm" and config.kv_lora_rank > 0


def _roundings(checkpoint: Checkpoint, config: ModelConfig, kind: str, dtype: str) -> list[str]:
    """Why this export cannot equal the checkpoint's model exactly, however right its rules are."""
    notes = []
    stored = {info.dtype for info in checkpoint.index.tensors.values()}
    if stored != {dtype}:
        notes.append(f"weights were stored as {', '.join(sorted(stored))} and exported as {dtype}")
    if config.zero_centered_norm and kind == "trtllm" and dtype != "float32":
        notes.append(f"1 + norm weight was rounded to {dtype}")
    if _approximates_gelu(config, kind):
        notes.append("the model has exact gelu, TensorRT-LLM computes its tanh form")
    if _replaces_epsilon(config, kind):
        notes.append(f"TensorRT-LLM norms queries and keys with epsilon {ENGINE_QK_NORM_EPSILON:g}")
    if _absorbs_keys(config, kind):
        notes.append(f"queries of the second half, as of generated tokens, come of products rounded to {dtype}")
    return notes
