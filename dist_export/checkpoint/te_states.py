"""Activation scales out of TransformerEngine's FP8 states (delayed scaling), per layer and expert.

Which entry of ``scale_fwd`` belongs to which tensor (transformer_engine/pytorch/module/*.py, attention.py, G GEMMs):

    Linear, LayerNormLinear   0 input (behind the norm), 1 weight, 2 output
    LayerNormMLP              fc1 as above, then fc2: its input is the first of the second half
    GroupedLinear up to 2.2   [G inputs, G weights, G outputs]
    GroupedLinear from 2.3    (input, weight, output) of expert 0, of expert 1, …
    DotProductAttention       2 query, key and value together

A scale multiplies before the cast; what is stored for inference is its inverse. Scales of weights are not taken: they
are a step older than the weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum

import numpy as np
from msgspec import Struct, field

from dist_export.checkpoint.extra_state import ExtraState, TeState
from dist_export.checkpoint.extra_state_records import StateRecord, read_states
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.checkpoint.te_groups import (
    AmbiguousScalesError,
    DifferentScalesError,
    GroupedScales,
    grouped_input_scales,
    is_interleaved_release,
    is_of_group,
)
from dist_export.errors import ExportError


class Activation(Enum):
    """The tensor that a scale is of."""

    INPUT = "input"
    FC2_INPUT = "input of fc2"
    QKV = "query, key and value"


class Problem(Enum):
    """Why a scale cannot be used."""

    UNCALIBRATED = "was never calibrated"
    NAN = "is NaN"
    ZERO = "is zero or too small to invert"
    NEGATIVE = "is negative"
    INFINITE = "is infinite"
    DIFFERS = "differs between training ranks"
    AMBIGUOUS = "cannot be told from the scales of other experts"
    MALFORMED = "has the wrong number of scales"


class TeScale(Struct, frozen=True):
    """An activation's scale."""

    module: ModuleName
    activation: Activation
    scale: float
    """float32; multiplies before the cast to FP8."""
    origin: str
    """The state it is from."""

    @property
    def dequantise(self) -> float:
        """1 / scale in float32: what a checkpoint for inference stores."""
        return float(np.float32(1) / np.float32(self.scale))


class TeFault(Struct, frozen=True):
    """A scale that cannot be used."""

    module: ModuleName
    activation: Activation
    problem: Problem
    message: str


class TeScales(Struct):
    """All that a checkpoint's TransformerEngine states say."""

    scales: dict[tuple[ModuleName, Activation], TeScale] = field(default_factory=dict)
    without: dict[ModuleName, str] = field(default_factory=dict)
    """Modules whose state has no scales, and why: they did not run in FP8, or by a recipe that keeps none."""
    faults: list[TeFault] = field(default_factory=list)
    recipes: set[str] = field(default_factory=set)
    releases: set[str] = field(default_factory=set)

    def faults_of(self, problem: Problem) -> list[TeFault]:
        """The faults of one kind."""
        return [fault for fault in self.faults if fault.problem is problem]


class _Found(Struct, frozen=True):
    record: StateRecord
    state: TeState


class ExpertGroups(Struct, frozen=True):
    """How a training run computed its experts; the first two arguments of `read_te_scales`."""

    grouped_gemm: bool = False
    num_local_experts: int | None = None

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, object] | None) -> ExpertGroups:
        """By the saved arguments (`Checkpoint.arguments`) of Megatron-LM or NeMo, as far as they tell."""
        given = arguments or {}
        total = given.get("num_experts") or given.get("num_moe_experts")
        ranks = given.get("expert_model_parallel_size") or 1
        known = isinstance(total, int) and isinstance(ranks, int) and total % ranks == 0
        grouped = given.get("moe_grouped_gemm") is True
        return cls(grouped, total // ranks if known else None)  # type: ignore[operator]


def read_te_scales(
    index: CheckpointIndex,
    *,
    grouped_gemm: bool = False,
    num_local_experts: int | None = None,
    te_version: tuple[int, int] | None = None,
) -> TeScales:
    """The activation scales of a checkpoint. Reads every layer state; one process calls it.

    Args:
        grouped_gemm: Whether the run computed experts by one grouped linear (``moe_grouped_gemm``); where it is False
            the states tell.
        num_local_experts: Experts that a rank of the training run held (``num_experts`` /
            ``expert_model_parallel_size``); needed where experts are one grouped linear.
        te_version: TransformerEngine's release where it is known, (2, 3); it decides how a grouped linear's scales
            are to be read where the states do not tell.

    Raises `ExportError` for states that cannot be read; scales that cannot be used are `TeScales.faults`.
    """
    return te_scales_of(
        read_states(index), grouped_gemm=grouped_gemm, num_local_experts=num_local_experts, te_version=te_version
    )


def te_scales_of(
    states: Iterable[tuple[StateRecord, ExtraState]],
    *,
    grouped_gemm: bool = False,
    num_local_experts: int | None = None,
    te_version: tuple[int, int] | None = None,
) -> TeScales:
    """As `read_te_scales`, of decoded states."""
    states = list(states)
    result, modules = TeScales(), defaultdict[ModuleName, list[_Found]](list)
    for record, state in states:
        if state.recipe:
            result.recipes.add(state.recipe.name)
        if state.te is None:
            result.without.setdefault(record.module, state.without)
        else:
            result.releases.add(state.te.release)
            modules[record.module].append(_Found(record, state.te))
    grouped: dict[tuple[str, int], list[GroupedScales]] = defaultdict(list)
    for name, found in modules.items():
        if "{expert}" in name.pattern and (grouped_gemm or any(is_of_group(each.state) for each in found)):
            parts = (GroupedScales(name, each.record.name, each.state) for each in found)
            grouped[name.pattern, name.layer].extend(parts)
            continue
        for activation, place in _places(name, found[0].state):
            _take(result, name, activation, place, found)
    if grouped:
        _take_grouped(result, grouped, num_local_experts, _interleaved(states, te_version))
    return result


def _places(name: ModuleName, state: TeState) -> Iterator[tuple[Activation, int]]:
    """The entries of ``scale_fwd`` that concern inference."""
    last = name.pattern.rpartition(".")[2]
    if last in ("core_attention", "fused_attention", "flash_attention", "unfused_attention"):
        yield Activation.QKV, 2
    elif last == "mlp":
        yield Activation.INPUT, 0
        yield Activation.FC2_INPUT, len(state.scale_fwd) // 2
    else:
        yield Activation.INPUT, 0


def _sizes(name: ModuleName, activation: Activation) -> tuple[int, ...]:
    """How many scales such a module may have: two per GEMM in TransformerEngine 0.1 and 0.2, three since."""
    if activation is Activation.QKV:
        return (9,)
    return (4, 6) if name.pattern.endswith(".mlp") else (2, 3)


def _take(result: TeScales, name: ModuleName, activation: Activation, place: int, found: Sequence[_Found]) -> None:
    """Enter the one scale that all ranks' states agree on, or the fault."""
    for each in found:
        if len(each.state.scale_fwd) not in _sizes(name, activation):
            wanted = " or ".join(map(str, _sizes(name, activation)))
            text = f"{each.record.name}: holds {len(each.state.scale_fwd)} scales, expected {wanted} of such a module"
            result.faults.append(TeFault(name, activation, Problem.MALFORMED, text))
            return
    first, scale = found[0], float(found[0].state.scale_fwd[place])
    other = next((each for each in found if not _same(float(each.state.scale_fwd[place]), scale)), None)
    if other is not None:
        text = (
            f"the scale of the {activation.value} is {scale!r} in {first.record.name} and "
            f"{float(other.state.scale_fwd[place])!r} in {other.record.name}: amax was not reduced over these training "
            "ranks, so none of them has that of the whole tensor; calibrate again"
        )
        result.faults.append(TeFault(name, activation, Problem.DIFFERS, text))
        return
    seen = any(bool(np.any(each.state.amax_history_fwd[:, place])) for each in found)
    _enter(result, name, activation, scale=scale, seen=seen, origin=first.record.name)


def _same(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)


def _enter(
    result: TeScales, name: ModuleName, activation: Activation, *, scale: float, seen: bool, origin: str
) -> None:
    problem = _problem(scale, seen)
    if problem is None:
        result.scales[name, activation] = TeScale(name, activation, scale, origin)
    else:
        text = f"{origin}: the scale of the {activation.value} {problem.value} (scale_fwd {scale!r})"
        result.faults.append(TeFault(name, activation, problem, text))


_LEAST = float(np.finfo(np.float32).tiny)  # the inverse of less may overflow, and no amax makes less


def _problem(scale: float, seen: bool) -> Problem | None:
    if scale != scale:
        return Problem.NAN
    if scale in (float("inf"), float("-inf")):
        return Problem.INFINITE
    if scale <= 0:
        return Problem.ZERO if scale == 0 else Problem.NEGATIVE
    if scale < _LEAST:
        return Problem.ZERO
    return Problem.UNCALIBRATED if scale == 1.0 and not seen else None


def _interleaved(states: Sequence[tuple[StateRecord, ExtraState]], te_version: tuple[int, int] | None) -> bool | None:
    """Whether grouped linears are kept expert by expert; None where neither the caller nor any state tells."""
    if te_version is not None:
        return is_interleaved_release(te_version)
    told = {state.te.interleaved for _, state in states if state.te is not None} - {None}
    if len(told) == 1:
        return told.pop()
    plain = (state for record, state in states if "{expert}" not in record.module.pattern)
    newer = any(state.te is None and state.without == "empty tensor" for state in plain)
    return True if newer and not told else None  # an empty tensor without FP8 is of 2.4 on; Megatron writes its own


def _take_grouped(
    result: TeScales,
    layers: Mapping[tuple[str, int], Sequence[GroupedScales]],
    num_local_experts: int | None,
    interleaved: bool | None,
) -> None:
    for (pattern, layer), parts in layers.items():
        try:
            entries = list(grouped_input_scales(parts, num_local_experts, interleaved))
        except ExportError as error:
            problem = Problem.AMBIGUOUS if isinstance(error, AmbiguousScalesError) else Problem.MALFORMED
            problem = Problem.DIFFERS if isinstance(error, DifferentScalesError) else problem
            result.faults.append(TeFault(ModuleName(pattern, layer), Activation.INPUT, problem, str(error)))
            continue
        for entry in entries:
            _enter(result, entry.module, Activation.INPUT, scale=entry.scale, seen=entry.seen, origin=entry.origin)
