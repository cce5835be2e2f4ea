"""Who does what: whatever the placement, all processes together do every use of every row exactly once."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

pytest.importorskip("torch")

from support.plans import plan_of
from support.small_models import LLAMA, small_model

from dist_export.errors import ExportError
from dist_export.plan import placement as placement_module
from dist_export.plan.placement import Placement, fills_of, make_placement, work_of
from dist_export.plan.recipes import Codes, Encoded, StoredScales
from dist_export.plan.work import Fill, SlabUses, Use, collect_uses
from dist_export.tensors.dtypes import FLOAT32, INT8
from dist_export.tensors.views import View


@cache
def work(tp: int, pp: int) -> tuple[list[SlabUses], list[Fill]]:
    model = small_model(LLAMA, hidden_size=8, ffn_hidden_size=8, kv_channels=2, padded_vocab_size=9)
    plan = plan_of(model, tp_size=tp, pp_size=pp, vocab_size=7)
    return collect_uses(plan.shards(), plan.catalog.tensors)


def check_once(placement: Placement, slabs: list[SlabUses], fills: list[Fill]) -> None:
    """Brute force: every (use, row) is counted over all processes."""
    done: Counter[tuple[object, ...]] = Counter()
    filled: Counter[tuple[int, int, int]] = Counter()
    for process in range(placement.num_processes):
        files = set(placement.files_near(process))  # a process plans no other files
        near = [SlabUses(s.slab, s.shape, s.dtype, tuple(u for u in s.uses if u.output.file in files)) for s in slabs]
        for item in work_of(process, placement, [slab for slab in near if slab.uses]):
            assert item.rows[0] < item.rows[1]
            for use in item.uses:
                for row in range(max(use.source[0], item.rows[0]), min(use.source[1], item.rows[1])):
                    done[item.slab, use.source, use.output.file, use.output.index, use.row, use.column, row] += 1
        for fill in fills_of(process, placement, fills):
            filled[fill.output.file, fill.output.index, fill.first] += 1
    expected = Counter(
        (slab.slab, use.source, use.output.file, use.output.index, use.row, use.column, row)
        for slab in slabs
        for use in slab.uses
        for row in range(use.source[0], use.source[1])
    )
    assert done == expected
    assert filled == Counter((f.output.file, f.output.index, f.first) for f in fills)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_placements(data: st.DataObject) -> None:
    tp, pp = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)]))
    slabs, fills = work(tp, pp)
    num_processes = data.draw(st.integers(1, 7))
    nodes = tuple(data.draw(st.lists(st.integers(0, 2), min_size=num_processes, max_size=num_processes)))
    costs = data.draw(st.lists(st.integers(0, 100), min_size=tp * pp, max_size=tp * pp))
    threshold = data.draw(st.sampled_from([0, 1 << 30]))  # always or never share rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement_module, "SHARE_MIN_BYTES", threshold)
        check_once(make_placement(nodes, costs), slabs, fills)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_every_file_has_an_owner_and_no_process_is_idle_that_could_work(num: int, costs: list[int]) -> None:
    placement = make_placement([0] * num, costs)
    firsts = [owners[0] for owners in placement.owners_of_file]
    assert firsts == sorted(firsts)
    owners = [process for owners in placement.owners_of_file for process in owners]
    assert set(owners) == set(range(num))
    if num >= len(costs):
        assert owners == list(range(num))
    else:
        assert all(len(owners) == 1 for owners in placement.owners_of_file)
    assert sorted(f for p in range(num) for f in placement.owned_by(p)) == list(range(len(costs)))


def test_as_many_processes_as_files_is_the_identity() -> None:
    placement = make_placement([0, 0, 1, 1], [1, 1000, 5, 5])
    assert placement.owners_of_file == ((0,), (1,), (2,), (3,))
    assert [placement.owned_by(process) for process in range(4)] == [[0], [1], [2], [3]]


def test_fewer_processes_take_runs_of_equal_cost() -> None:
    assert make_placement([0, 0], [10] * 8).owners_of_file == ((0,),) * 4 + ((1,),) * 4
    assert make_placement([0, 0], [100, 10, 10, 80]).owners_of_file == ((0,), (1,), (1,), (1,))


def test_more_processes_share_the_costliest_files() -> None:
    assert make_placement([0] * 4, [10, 100]).owners_of_file == ((0,), (1, 2, 3))
    assert make_placement([0] * 4, [10, 10]).owners_of_file == ((0, 1), (2, 3))


def test_nothing_to_place() -> None:
    with pytest.raises(ExportError, match="cannot place 0 output files on 2 processes"):
        make_placement([0, 0], [])


@pytest.mark.parametrize(("nodes", "times"), [((0, 0, 0, 0), 1), ((0, 0, 1, 1), 2), ((0, 1, 2, 3), 4)])
def test_columns_of_common_rows_are_read_once_per_node(nodes: tuple[int, ...], times: int) -> None:
    """Rows cut for four targets: the processes of a node each read a share of them, whole."""
    slabs, _ = work(4, 1)
    placement = make_placement(nodes, [1] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement_module, "SHARE_MIN_BYTES", 0)
        cut = [slab for slab in slabs if "linear_fc2" in slab.slab.name]
        items = [item for process in range(4) for item in work_of(process, placement, cut)]
    rows_read = sum(item.rows[1] - item.rows[0] for item in items)
    assert rows_read == times * sum(slab.shape[0] for slab in cut)
    per_item = {len({use.source[2:] for use in item.uses}) for item in items}
    assert per_item == {4 // times}


def test_small_slabs_are_not_shared() -> None:
    slabs, _ = work(4, 1)
    placement = make_placement((0, 0, 0, 0), [1] * 4)
    cut = [slab for slab in slabs if "linear_fc2" in slab.slab.name]
    assert all(len({use.output.file for use in item.uses}) == 1 for item in work_of(2, placement, cut))


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_rows_that_share_a_byte_stay_with_one_process(num_processes: int) -> None:
    """INT4 codes of two rows lie in one byte, which one process has to write."""
    slabs, _ = work(1, 1)
    slab = next(slab for slab in slabs if "linear_fc2" in slab.slab.name)
    scales = StoredScales(View.zeros((slab.shape[0], 1)), FLOAT32, 7.0)

    def packed(use: Use) -> Use:
        planned = replace(use.output.planned, dtype=INT8, recipe=Encoded(Codes.INT4, scales))
        return replace(use, output=replace(use.output, planned=planned))

    packed_slab = replace(slab, uses=tuple(map(packed, slab.uses)))
    placement = make_placement([0] * num_processes, [1])
    items = [item for process in range(num_processes) for item in work_of(process, placement, [packed_slab])]
    assert len(items) > 1 and [row % 2 for item in items for row in item.rows] == [0] * 2 * len(items)
    rows = sorted(item.rows for item in items)
    assert (rows[0][0], rows[-1][1]) == (0, slab.shape[0])
    assert all(upper[1] == lower[0] for upper, lower in itertools.pairwise(rows))
