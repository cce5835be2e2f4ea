"""Heads, key/value groups and head size: three numbers that two shapes tie together.

With nq heads, ng groups and head size d (Megatron-Core attention.py): linear_proj is [h, nq·d] and
linear_qkv is [(nq + 2·ng)·d, h]. One of nq and d must be known; the shapes prove the rest.
"""

from __future__ import annotations

from dist_export.errors import Faults
from dist_export.models.provenance import Claim, derived, from_tensor
from dist_export.models.tensor_evidence import ATTENTION_OUT, Q_NORM, QKV, Shapes, shape_claim

HEADS, GROUPS, SIZE = "num_attention_heads", "num_query_groups", "head_size"
_PROJ_WEIGHT, _QKV_WEIGHT = ATTENTION_OUT + ".weight", QKV + ".weight"


def complete(chosen: dict[str, Claim], shapes: Shapes, faults: Faults) -> None:
    """Fill in what is missing of the three fields in `chosen`, then check all against the shapes.

    Fields stay missing when neither `chosen` nor the shapes give them.
    """
    _fill_heads_and_size(chosen, shapes)
    _fill_groups(chosen, shapes)
    _check(chosen, shapes, faults)


def _integer(chosen: dict[str, Claim], field: str) -> int | None:
    value = chosen[field].value if field in chosen else None
    return value if isinstance(value, int) and value > 0 else None


def _fill_heads_and_size(chosen: dict[str, Claim], shapes: Shapes) -> None:
    if SIZE not in chosen:
        norm = shape_claim(shapes, Q_NORM, 0)
        if norm is not None:
            chosen[SIZE] = norm
    heads, size = _integer(chosen, HEADS), _integer(chosen, SIZE)
    width = shapes[_PROJ_WEIGHT][1] if _PROJ_WEIGHT in shapes else None
    proj = str(shapes.get(_PROJ_WEIGHT, ""))
    if HEADS not in chosen and size and width and width % size == 0:
        chosen[HEADS] = Claim(width // size, from_tensor(_PROJ_WEIGHT), proj)
    if SIZE in chosen or not heads:
        return
    if width and width % heads == 0:
        chosen[SIZE] = Claim(width // heads, from_tensor(_PROJ_WEIGHT), proj)
        return
    hidden = _integer(chosen, "hidden_size")
    if hidden and hidden % heads == 0:
        chosen[SIZE] = Claim(hidden // heads, derived("hidden_size / num_attention_heads"), default=True)


def _fill_groups(chosen: dict[str, Claim], shapes: Shapes) -> None:
    """Groups from the rows that queries leave: arguments always say, so this serves checkpoints without them."""
    heads, size = _integer(chosen, HEADS), _integer(chosen, SIZE)
    known = chosen.get(GROUPS)
    if (known is not None and not known.default) or _QKV_WEIGHT not in shapes or not heads or not size:
        return
    groups, rest = divmod(shapes[_QKV_WEIGHT][0] - heads * size, 2 * size)
    if rest == 0 and groups > 0:
        chosen[GROUPS] = Claim(groups, from_tensor(_QKV_WEIGHT), str(shapes[_QKV_WEIGHT]))


def _check(chosen: dict[str, Claim], shapes: Shapes, faults: Faults) -> None:
    heads, groups, size = (_integer(chosen, field) for field in (HEADS, GROUPS, SIZE))
    if heads and size:
        _check_dim(chosen, shapes, _PROJ_WEIGHT, 1, heads * size, (HEADS, SIZE), faults)
    if heads and size and groups:
        rows = (heads + 2 * groups) * size
        _check_dim(chosen, shapes, _QKV_WEIGHT, 0, rows, (HEADS, GROUPS, SIZE), faults)
    if size and Q_NORM in shapes:
        _check_dim(chosen, shapes, Q_NORM, 0, size, (SIZE,), faults)


def _check_dim(
    chosen: dict[str, Claim],
    shapes: Shapes,
    name: str,
    dim: int,
    expected: int,
    fields: tuple[str, ...],
    faults: Faults,
) -> None:
    shape = shapes.get(name)
    if shape is None or shape[dim] == expected:
        return
    listed = ", ".join(f"{field} {chosen[field].value} ({chosen[field].source})" for field in fields)
    unit = "rows" if dim == 0 else "columns"
    faults.add(
        f"{', '.join(fields)}: {listed} make {expected} {unit}, but {name} is {shape}: "
        "these values are not this checkpoint's; correct them with --set field=value"
    )
