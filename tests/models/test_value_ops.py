"""Value operations as data: inverses cancel, order is kept."""

from __future__ import annotations

import pytest
from support.small_models import model_config

from dist_export.models.value_ops import ValueOp, composed, no_value_ops, plus_one_if_zero_centered

ADD, SUBTRACT = ValueOp.ADD_ONE, ValueOp.SUBTRACT_ONE


@pytest.mark.parametrize(
    ("ops", "result"),
    [((), ()), ((ADD,), (ADD,)), ((ADD, SUBTRACT), ()), ((SUBTRACT, ADD), ()), ((ADD, ADD, SUBTRACT), (ADD,)),
     ((ADD, SUBTRACT, ADD), (ADD,)), ((ADD, ADD, SUBTRACT, SUBTRACT), ()), ((ADD, ADD), (ADD, ADD))],
)  # fmt: skip
def test_neighbours_that_are_inverse_cancel(ops: tuple[ValueOp, ...], result: tuple[ValueOp, ...]) -> None:
    assert composed(ops) == result


def test_only_zero_centered_norms_get_the_one() -> None:
    assert plus_one_if_zero_centered(model_config(zero_centered_norm=True)) == (ADD,)
    assert plus_one_if_zero_centered(model_config()) == ()
    assert no_value_ops(model_config(zero_centered_norm=True)) == ()
    assert all(op.inverse.inverse is op for op in ValueOp)
