"""Which rows of a weight the rows of an adapter's B belong to, and where they lie in the file.

See `dist_export.models.adapters` for what the trainers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from dist_export.checkpoint.adapters import AdapterSettings
from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig
from dist_export.models.source_tensor import SourceTensor

Starts = Callable[[], Sequence[int]]
"""Gives rows at which a matrix was cut."""


class RowOrder(Struct, frozen=True):
    """What the order of rows depends on."""

    config: ModelConfig
    settings: AdapterSettings
    is_expert: bool


class Placed(Struct, frozen=True):
    """`num_rows` rows of B, at `stored` in the file, belong to the weight's rows from `base` on."""

    base: int
    stored: int
    num_rows: int


def placed_rows(
    order: RowOrder, where: str, part: str, num_rows: int, b: SourceTensor, starts: Starts
) -> Iterator[Placed]:
    """All rows of `b`, the adapter of a `part` (empty: all) of a weight of `num_rows` rows at the module `where`.

    `starts` gives the rows at which `b` was cut when it was saved: one cut per tensor parallel rank, or two where each
    rank's rows were saved as halves. Raises `ExportError` when the order cannot be told.
    """
    halves = _num_halves(order, where, part, b, starts)
    for placed in _by_part(order, where, part, num_rows, b, starts):
        yield from _undo_halves(placed, b.shape[0], halves // 2) if halves else (placed,)


def _num_halves(order: RowOrder, where: str, part: str, b: SourceTensor, starts: Starts) -> int:
    """How many halves of ranks there are in the file, all first halves before all second ones; 0: rows are in order."""
    if not where.endswith("linear_fc1") or (order.config.gated and not part):
        return 0  # gate and up of a fused weight are meant to be apart, as the base's are
    cuts = starts()
    settings, num = order.settings, len(cuts)
    tp_size = (settings.expert_tp_size if order.is_expert else None) or settings.tp_size
    always = bool(part) or settings.always_halves
    known = num % 2 == 0 if always else tp_size is not None and num in (tp_size, 2 * tp_size)
    regular = b.shape[0] % num == 0 and all(start == i * (b.shape[0] // num) for i, start in enumerate(cuts))
    if not known or not regular:
        raise ExportError(
            f"{where}: linear_out of its adapter{_named(part)} is saved in {num} chunks of rows, from which the tensor "
            "parallel size of its training cannot be told, and so the order of its rows; merge it with the trainer"
        )
    return num if always or num != tp_size else 0


def _undo_halves(placed: Placed, num_rows: int, tp_size: int) -> Iterator[Placed]:
    """`placed` by the order of training, as the file has it: megatron/core/transformer/mlp.py,
    `apply_swiglu_sharded_factory`, gives the halves of rank r the places r and r + tp_size of 2 * tp_size."""
    half = num_rows // (2 * tp_size)
    row, end = placed.stored, placed.stored + placed.num_rows
    while row < end:
        block, inside = divmod(row, half)
        count = min(half - inside, end - row)
        stored = (block // 2 + (block % 2) * tp_size) * half + inside
        yield Placed(placed.base + row - placed.stored, stored, count)
        row += count


def _by_part(
    order: RowOrder, where: str, part: str, num_rows: int, b: SourceTensor, starts: Starts
) -> Iterator[Placed]:
    config, rows = order.config, b.shape[0]
    fitting = {"gate": num_rows // 2, "up": num_rows // 2, "": num_rows}
    heads = config.num_attention_heads // config.num_query_groups * config.head_size  # rows of the queries of a group
    sizes = {"q": heads, "k": config.head_size, "v": config.head_size}
    if part in sizes:
        fitting[part] = sizes[part] * config.num_query_groups
    expected_weight = config.num_query_groups * sum(sizes.values()) if part in sizes else num_rows
    is_split = where.endswith("linear_qkv") if part in sizes else not part or where.endswith("linear_fc1")
    if rows != fitting[part] or num_rows != expected_weight or not is_split:
        raise ExportError(
            f"{where}: linear_out of its adapter{_named(part)} has {rows} rows, expected {fitting[part]}; the base's "
            f"weight has {num_rows} rows, expected {expected_weight}"
        )
    if part not in sizes:
        yield Placed(num_rows // 2 if part == "up" else 0, 0, rows)
        return
    blocks = _query_blocks(order, where, len(starts()))
    offset = {"q": 0, "k": heads, "v": heads + config.head_size}[part]
    step = sizes[part] * (config.num_query_groups // blocks)
    for block in range(blocks):
        yield Placed(block * (num_rows // blocks) + offset * (config.num_query_groups // blocks), block * step, step)


def _query_blocks(order: RowOrder, where: str, tp_size: int) -> int:
    """How many times q, k and v follow one another in the weight that training added to: once per query group, or once
    per tensor parallel rank (NeMo 2 and Megatron-Bridge up to 0.2.2, `LoRALinearSplitQKV.forward`)."""
    groups = order.config.num_query_groups
    if order.settings.query_blocks is False or tp_size == groups:
        return groups
    if order.settings.query_blocks is None or groups % tp_size:
        raise ExportError(
            f"{where}: whether its adapters of q, k and v were added group by group or rank by rank depends on the "
            f"release of the trainer, which {order.settings.origin} does not tell; the model has {groups} query groups "
            f"and was trained on {tp_size} tensor parallel ranks. Merge them with the trainer and export the result"
        )
    return tp_size


def _named(part: str) -> str:
    return f" {part}" if part else ""
