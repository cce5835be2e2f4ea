"""Layout and shard operations are run on numbers: split and join, take and restore undo one another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_models import model_config
from support.views import run, source

from dist_export.errors import ExportError
from dist_export.models.layout_ops import (
    SAME,
    SPLIT_HALVES,
    SPLIT_INTERLEAVED,
    SPLIT_KEY_VALUE_UP,
    SPLIT_QKV,
    LayoutOp,
    TrimVocabulary,
)
from dist_export.models.shard_ops import (
    COLUMN,
    HEADS,
    KEY_VALUE_HEADS,
    ON_FIRST_RANK,
    REPLICATE,
    ROW,
    SlicePadded,
    TensorParallel,
)
from dist_export.tensors.views import View, concatenate

VOCABULARY = SlicePadded(lambda config: config.vocab_size)


def test_qkv_rows_are_group_major() -> None:
    config = model_config(num_attention_heads=4, num_query_groups=2, head_size=2)
    view, numbers = source((16, 3))
    query, key, value = (run(part, numbers) for part in SPLIT_QKV.split(view, config))
    grouped = run(view, numbers).reshape(2, 4, 2, 3)  # group, head within it (2 queries, key, value), row, column
    assert (query == grouped[:, :2].reshape(8, 3)).all()
    assert (key == grouped[:, 2].reshape(4, 3)).all()
    assert (value == grouped[:, 3].reshape(4, 3)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_qkv_split_and_join_are_inverse(data: st.DataObject) -> None:
    groups, per_group, size = (data.draw(st.integers(1, 4)) for _ in range(3))
    config = model_config(num_attention_heads=groups * per_group, num_query_groups=groups, head_size=2 * size)
    rows = groups * (per_group + 2) * 2 * size
    view, numbers = source((rows, 3) if data.draw(st.booleans()) else (rows,))
    parts = SPLIT_QKV.split(view, config)
    assert not any(part.faults() for part in parts)
    joined = SPLIT_QKV.join(parts, config)
    assert joined.faults() == []
    assert (run(joined, numbers) == run(view, numbers)).all()


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_gate_is_the_first_half_and_up_the_second(shape: tuple[int, ...]) -> None:
    config, (view, numbers) = model_config(), source(shape)
    gate, up = SPLIT_HALVES.split(view, config)
    whole = run(view, numbers)
    assert (run(gate, numbers) == whole[:12]).all()
    assert (run(up, numbers) == whole[12:]).all()
    assert SPLIT_HALVES.join((gate, up), config) == view


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_blocks_that_alternate_on_each_rank_split_and_join(data: st.DataObject) -> None:
    pairs, size, ranks = (data.draw(st.integers(1, 4)) for _ in range(3))
    config = model_config(
        num_experts=2,
        moe_top_k=1,
        moe_ffn_hidden_size=pairs * size * ranks,
        moe_glu_interleave_size=size,
        moe_glu_interleave_num_shards=ranks,
    )
    view, numbers = source((2 * pairs * size * ranks, 3))
    parts = SPLIT_INTERLEAVED.split(view, config)
    stored = run(view, numbers).reshape(2, ranks, pairs * size, 3)  # half of a rank's rows, rank
    on_ranks = stored.swapaxes(0, 1).reshape(ranks, pairs, 2, size, 3)  # as TEGroupedMLP sees them
    for number, part in enumerate(parts):
        assert not part.faults()
        assert (run(part, numbers) == on_ranks[:, :, number].reshape(-1, 3)).all()
    joined = SPLIT_INTERLEAVED.join(parts, config)
    assert joined.faults() == []
    assert (run(joined, numbers) == run(view, numbers)).all()


def test_each_head_of_latent_attention_has_its_keys_before_its_values() -> None:
    sizes = {"kv_lora_rank": 3, "qk_nope_head_size": 2, "qk_rope_head_size": 2, "value_head_size": 5}
    sizes |= {"head_size": 4, "num_query_groups": 4}
    config, (view, numbers) = model_config(num_attention_heads=4, **sizes), source((4 * (2 + 5), 3))
    parts = SPLIT_KEY_VALUE_UP.split(view, config)
    heads = run(view, numbers).reshape(4, 7, 3)
    assert (run(parts[0], numbers) == heads[:, :2].reshape(8, 3)).all()
    assert (run(parts[1], numbers) == heads[:, 2:].reshape(20, 3)).all()
    assert (run(SPLIT_KEY_VALUE_UP.join(parts, config), numbers) == run(view, numbers)).all()
    with pytest.raises(ExportError, match="has 21 rows, expected 28"):
        SPLIT_KEY_VALUE_UP.split(source((21, 3))[0], config)


def test_padding_rows_leave_the_vocabulary_and_come_back_as_zeros() -> None:
    config, (view, numbers) = model_config(padded_vocab_size=16, vocab_size=13), source((16, 4))
    table, head = TrimVocabulary(2).split(view, config)
    assert table == head
    assert (run(table, numbers) == run(view, numbers)[:13]).all()
    back = run(TrimVocabulary(2).join((table, head), config), numbers)
    assert (back[:13] == run(view, numbers)[:13]).all()
    assert (back[13:] == 0).all()


def test_same_is_same() -> None:
    config, (view, _) = model_config(), source((3, 4))
    assert SAME.join(SAME.split(view, config), config) is view


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        (SPLIT_QKV, (15, 4), r"fused qkv has 15 rows, expected 16 = \(heads 4 \+ 2 x groups 2\) x head size 2"),
        (SPLIT_HALVES, (23, 4), "gated fc1 has 23 rows, which cannot be halved"),
        (TrimVocabulary(), (15, 4), r"vocabulary has 15 rows, expected 16 \(padded\)"),
    ],
)
def test_misfits_name_the_numbers(op: LayoutOp, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        op.split(source(shape)[0], model_config())


# --- shards ---


def expected_shard(whole: np.ndarray, op: Any, tp: TensorParallel, groups: int) -> np.ndarray:
    """The shard by numpy."""
    if op is REPLICATE:
        return whole
    if op is ON_FIRST_RANK:
        return whole if tp.rank == 0 else np.zeros_like(whole)
    if op is ROW:
        return np.split(whole, tp.size, 1)[tp.rank]
    if op is KEY_VALUE_HEADS and groups < tp.size:
        whole = np.repeat(whole.reshape(groups, -1, *whole.shape[1:]), tp.size // groups, 0)
        return whole[tp.rank]
    if op is VOCABULARY:
        rows = -(-len(whole) // tp.size) * tp.size
        whole = np.concatenate([whole, np.zeros((rows - len(whole), *whole.shape[1:]), int)])
    return np.split(whole, tp.size, 0)[tp.rank]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("op", "rows"),
    [(REPLICATE, 5), (ON_FIRST_RANK, 5), (COLUMN, 24), (ROW, 3), (HEADS, 32), (KEY_VALUE_HEADS, 8), (VOCABULARY, 13)],
    ids=["replicate", "on first rank", "column", "row", "heads", "kv heads", "vocabulary"],
)
def test_shards_equal_numpy_and_restore(op: Any, rows: int, size: int) -> None:
    config = model_config(num_attention_heads=8, num_query_groups=2, vocab_size=13)
    view, numbers = source((rows, 16))
    shards = [op.take(view, TensorParallel(rank, size), config) for rank in range(size)]
    for rank, shard in enumerate(shards):
        assert shard.faults() == []
        wanted = expected_shard(run(view, numbers), op, TensorParallel(rank, size), 2)
        assert (run(shard, numbers) == wanted).all()
    assert (run(op.restore(shards, config), numbers) == run(view, numbers)).all()


def test_few_heads_are_repeated_in_a_row() -> None:
    config = model_config(num_attention_heads=8, num_query_groups=2)
    view, numbers = source((4, 1))
    held = [run(KEY_VALUE_HEADS.take(view, TensorParallel(rank, 8), config), numbers)[0, 0] for rank in range(8)]
    assert held == [1, 1, 1, 1, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("op", "rows", "size", "message"),
    [
        (COLUMN, 10, 4, r"dim 0 of shape \[10, 16\] does not divide by tp 4"),
        (ROW, 10, 3, r"dim 1 of shape \[10, 16\] does not divide by tp 3"),
        (HEADS, 32, 3, "8 attention heads do not divide by tp 3"),
        (KEY_VALUE_HEADS, 12, 4, "tp 4 is not a multiple of the 3 key/value heads to repeat"),
        (KEY_VALUE_HEADS, 12, 2, "3 key/value heads do not divide by tp 2"),
    ],
)
def test_what_does_not_divide_is_refused(op: Any, rows: int, size: int, message: str) -> None:
    heads = (9, 3) if op is KEY_VALUE_HEADS else (8, 2)
    config = model_config(num_attention_heads=heads[0], num_query_groups=heads[1])
    with pytest.raises(ExportError, match=message):
        op.take(source((rows, 16))[0], TensorParallel(0, size), config)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3))
def test_source_split_and_target_shards_together_rebuild_the_fused_tensor(groups: int, tp: int, size: int) -> None:
    config = model_config(num_attention_heads=8, num_query_groups=groups, head_size=2 * size)
    view, numbers = source(((8 + 2 * groups) * 2 * size, 2))
    parts = SPLIT_QKV.split(view, config)
    ops = (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
    ranks = [TensorParallel(rank, tp) for rank in range(tp)]
    written = [concatenate([op.take(p, rank, config) for op, p in zip(ops, parts, strict=True)], 0) for rank in ranks]
    taken: list[View] = []
    for number, op in enumerate(ops):
        sizes = [op.take(parts[number], rank, config).shape[0] for rank in ranks]
        before = [sum(o.take(p, r, config).shape[0] for o, p in zip(ops[:number], parts, strict=False)) for r in ranks]
        pieces = [w.narrow(0, start, n) for w, start, n in zip(written, before, sizes, strict=True)]
        taken.append(op.restore(pieces, config))
    assert (run(SPLIT_QKV.join(taken, config), numbers) == run(view, numbers)).all()
