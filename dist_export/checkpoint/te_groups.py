"""Scales of experts that one grouped linear computes, put back in order.

Megatron-Core 0.8 and 0.9 save the whole state of a rank's G experts under each of them. From 0.11 on
(`_split_extra_state` of megatron/core/extensions/transformer_engine.py) expert g gets ``scale_fwd.view(3, G)[:, g]``:
right where TransformerEngine keeps [inputs, weights, outputs], up to its release 2.2. From 2.3 on it keeps
(input, weight, output) of one expert after the other, and then the parts hold scales of other experts. Put together
again they are the flat vector as TransformerEngine had it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from msgspec import Struct

from dist_export.checkpoint.extra_state import Float32, TeState
from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.errors import ExportError

_KINDS = 3  # input, weight, output
_FIRST_INTERLEAVED = (2, 3)


class AmbiguousScalesError(ExportError):
    """Whose scale is whose cannot be told."""


class DifferentScalesError(ExportError):
    """States that must be equal are not."""


class GroupedScales(Struct, frozen=True, eq=False):
    """A state under an expert's name (or, in legacy files, the one of all of a rank's experts)."""

    module: ModuleName
    origin: str
    state: TeState


class GroupedEntry(Struct, frozen=True):
    """The scale of one expert's input."""

    module: ModuleName
    scale: float
    seen: bool
    """Whether its amax history has anything but zeros."""
    origin: str


def is_interleaved_release(version: tuple[int, int]) -> bool:
    """Whether a TransformerEngine release keeps a grouped linear's scales expert by expert."""
    return version >= _FIRST_INTERLEAVED


def is_of_group(state: TeState) -> bool:
    """Whether a state is of a grouped linear of several experts, or a part of one: a part is a view with gaps, whose
    storage is that of all and is saved with it."""
    return state.whole is not None or len(state.scale_fwd) > _KINDS


def grouped_input_scales(
    parts: Sequence[GroupedScales], num_local_experts: int | None, interleaved: bool | None
) -> Iterator[GroupedEntry]:
    """The input scales of one layer's linear, per expert.

    Args:
        parts: All states of the layer's linear.
        num_local_experts: G, experts of a training rank.
        interleaved: How TransformerEngine kept them; None takes only scales on which both readings agree.

    Raises `ExportError` where experts are missing, contradict each other, or cannot be told apart.
    """
    whole_without_number = [part for part in parts if part.module.expert < 0]
    if whole_without_number:
        yield from _of_ranks(whole_without_number, num_local_experts, interleaved)
        return
    count = _checked_count(parts, num_local_experts)
    ranks: dict[int, dict[int, GroupedScales]] = defaultdict(dict)
    for part in parts:
        ranks[part.module.expert // count][part.module.expert % count] = part
    for rank, experts in ranks.items():
        if len(experts) != count:
            there = ", ".join(str(rank * count + local) for local in sorted(experts))
            raise ExportError(
                f"{parts[0].origin}: a rank held experts {rank * count} to {rank * count + count - 1}, states are "
                f"there for {there}"
            )
        yield from _of_rank([experts[local] for local in range(count)], interleaved)


def _checked_count(parts: Sequence[GroupedScales], num_local_experts: int | None) -> int:
    first = parts[0]
    sizes = {_size_of(part.state) for part in parts} - {None}
    told = {size // _KINDS for size in sizes if size is not None}
    if num_local_experts is None and len(told) == 1:
        return told.pop()
    if num_local_experts is None:
        raise AmbiguousScalesError(
            f"{first.origin}: how many experts a training rank held is not known (num_experts / "
            "expert_model_parallel_size), and with it not whose scale this is"
        )
    if told - {num_local_experts}:
        listed = ", ".join(map(str, sorted(told)))
        raise ExportError(
            f"{first.origin}: was saved from {listed} experts per rank, num_experts / expert_model_parallel_size of "
            f"the checkpoint's arguments is {num_local_experts}"
        )
    return num_local_experts


def _size_of(state: TeState) -> int | None:
    """Length of the rank's flat vector, where the state shows it."""
    if state.whole is not None:
        return len(state.whole)
    return len(state.scale_fwd) if len(state.scale_fwd) > _KINDS else None


def _of_rank(experts: Sequence[GroupedScales], interleaved: bool | None) -> Iterator[GroupedEntry]:
    """One rank's experts in local order."""
    count = len(experts)
    scale, history = _flat(experts)
    for local, part in enumerate(experts):
        yield _entry(part.module, scale, history, _place(part, scale, history, local, count, interleaved), part)


def _of_ranks(
    parts: Sequence[GroupedScales], num_local_experts: int | None, interleaved: bool | None
) -> Iterator[GroupedEntry]:
    """Legacy files: a state of all local experts per rank, which must agree where they are of one ep rank.

    Yields the smallest scale (the largest amax) of the experts that were calibrated, for all of them together.
    """
    first = parts[0]
    for part in parts[1:]:
        if not np.array_equal(part.state.scale_fwd, first.state.scale_fwd, equal_nan=True):
            raise DifferentScalesError(
                f"the scales in {first.origin} and {part.origin} differ: amax was not reduced over these ranks; "
                "calibrate again"
            )
    scale, history = first.state.scale_fwd, first.state.amax_history_fwd
    count = _checked_count(parts, num_local_experts)
    if len(scale) != _KINDS * count:
        raise ExportError(f"{first.origin}: holds {len(scale)} scales, expected {_KINDS * count} of {count} experts")
    entries = [
        _entry(first.module, scale, history, _place(first, scale, history, local, count, interleaved), first)
        for local in range(count)
    ]
    calibrated = [entry for entry in entries if entry.seen or entry.scale != 1.0] or entries
    broken = [entry for entry in calibrated if not entry.scale > 0]  # NaN, zero or negative: for the caller to name
    yield broken[0] if broken else min(calibrated, key=lambda entry: entry.scale)


def _flat(experts: Sequence[GroupedScales]) -> tuple[Float32, Float32]:
    """The rank's vectors [3 x G] and [L, 3 x G] as TransformerEngine had them."""
    count, first = len(experts), experts[0]
    if all(len(part.state.scale_fwd) == _KINDS * count for part in experts) and count > 1:
        for part in experts[1:]:
            if not np.array_equal(part.state.scale_fwd, first.state.scale_fwd, equal_nan=True):
                raise DifferentScalesError(f"{first.origin} and {part.origin} are of one training rank and differ")
        return first.state.scale_fwd, first.state.amax_history_fwd
    wrong = next((part for part in experts if len(part.state.scale_fwd) != _KINDS), None)
    if wrong is not None:
        raise ExportError(
            f"{wrong.origin}: holds {len(wrong.state.scale_fwd)} scales, expected {_KINDS}, or {_KINDS * count} of all "
            f"{count} experts of its rank"
        )
    lengths = {len(part.state.amax_history_fwd) for part in experts}
    if len(lengths) > 1:
        raise ExportError(f"{first.origin}: experts of one rank have amax histories of lengths {sorted(lengths)}")
    scale = np.stack([part.state.scale_fwd for part in experts], axis=1).reshape(-1)
    history = np.stack([part.state.amax_history_fwd for part in experts], axis=2)
    _check_whole(experts, scale)
    return scale, history.reshape(len(history), -1)


def _check_whole(experts: Sequence[GroupedScales], scale: Float32) -> None:
    """A part is a view of its rank's whole vector and was saved with it: it must be what the parts make."""
    for part in experts:
        if part.state.whole is not None and not np.array_equal(part.state.whole, scale, equal_nan=True):
            raise ExportError(f"{part.origin}: was cut out of other scales than the states of its rank's experts")


def _place(
    part: GroupedScales, scale: Float32, history: Float32, local: int, count: int, interleaved: bool | None
) -> int:
    """Where the flat vector has the input of local expert `local`."""
    blocks, alternating = local, _KINDS * local
    if interleaved is not None:
        return alternating if interleaved else blocks
    same = scale[blocks] == scale[alternating] and np.array_equal(history[:, blocks], history[:, alternating])
    if same:
        return blocks
    raise AmbiguousScalesError(
        f"{part.origin}: whose scale is whose in a grouped linear changed with TransformerEngine 2.3, and neither the "
        f"states nor the checkpoint say which release wrote them: the input's is {float(scale[blocks])!r} or "
        f"{float(scale[alternating])!r}; tell the release, or calibrate again"
    )


def _entry(module: ModuleName, scale: Float32, history: Float32, place: int, part: GroupedScales) -> GroupedEntry:
    return GroupedEntry(module, float(scale[place]), bool(np.any(history[:, place])), part.origin)
