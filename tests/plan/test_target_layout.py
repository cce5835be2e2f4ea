"""Rank numbers and layers of a tp x pp grid."""

from __future__ import annotations

import pytest

from dist_export.errors import ExportError
from dist_export.plan.layout import TargetLayout


def test_tp_is_the_fastest_axis_and_layers_are_global() -> None:
    layout = TargetLayout(2, 3, (2, 1, 1))
    assert layout.world_size == 6
    assert list(layout.positions()) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    found = [(layout.tensor_parallel(rank).rank, layout.pp_rank(rank)) for rank in range(6)]
    assert found == list(layout.positions())
    assert [list(layout.layers(rank)) for rank in (0, 1, 2, 5)] == [[0, 1], [0, 1], [2], [3]]
    assert str(layout) == "tp 2 x pp 3"


@pytest.mark.parametrize("sizes", [(0, 1, (1,)), (1, 0, ()), (1, 2, (4,))])
def test_what_is_no_grid(sizes: tuple[int, int, tuple[int, ...]]) -> None:
    with pytest.raises(ExportError, match="not a layout"):
        TargetLayout(*sizes)
