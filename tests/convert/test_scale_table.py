"""Scales of modules that share one: the largest of those that are known and of those that an amax gives."""

from __future__ import annotations

import numpy as np
import pytest

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.convert.scale_table import ScaleTable

ONE, OTHER = (ModuleName("decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1", 0, n) for n in (0, 1))


@pytest.mark.parametrize(("amax", "scale"), [(448.0, 1.5), (896.0, 2.0)])
def test_a_scale_and_an_amax(amax: float, scale: float) -> None:
    """An expert with a scale of TransformerEngine's (or stored codes) beside one with ModelOpt's amax."""
    table = ScaleTable(
        {ONE: np.float32(amax)}, {ONE: np.float32(amax)}, input_scales={OTHER: 1.5}, weight_scales={OTHER: 1.5}
    )
    for found in (table.input_scale, table.weight_scale):
        assert found((ONE, OTHER), 448.0) == found((OTHER, ONE), 448.0) == np.float32(scale)
        assert found((ONE,), 448.0) == np.float32(amax / 448) and found((OTHER,), 448.0) == np.float32(1.5)


def test_all_of_it_comes_back_from_a_file() -> None:
    third, tenth = np.float32(1) / np.float32(3), 0.1
    table = ScaleTable(
        {ONE: third}, {OTHER: np.float32(2)}, {ONE: tenth}, {OTHER: 0.7}, {"rows": np.array([third, 0, 5], np.float32)}
    )
    other = ScaleTable.decode(table.encode())
    assert (other.weights, other.inputs, other.input_scales, other.weight_scales) == (
        table.weights,
        table.inputs,
        table.input_scales,
        table.weight_scales,
    )
    assert other.rows.keys() == {"rows"} and (other.rows["rows"] == table.rows["rows"]).all()
