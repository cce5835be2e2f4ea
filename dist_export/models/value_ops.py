"""Value operations: arithmetic on elements, named here and executed by `dist_export.convert.torch_arithmetic`.

A rule lists them as data; a plan composes the lists of its two sides and cancels neighbours that are
inverse to each other, so that a zero-centred norm exported to a zero-centred target stays untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from dist_export.models.config import ModelConfig


class ValueOp(Enum):
    """An elementwise operation in the tensor's own element type."""

    ADD_ONE = "add one"
    """gamma = 1 + stored weight of a zero-centred norm. Rounds once, in the source's element type."""
    SUBTRACT_ONE = "subtract one"

    @property
    def inverse(self) -> ValueOp:
        return _INVERSE[self]


_INVERSE = {ValueOp.ADD_ONE: ValueOp.SUBTRACT_ONE, ValueOp.SUBTRACT_ONE: ValueOp.ADD_ONE}

ValueOps = Callable[[ModelConfig], tuple[ValueOp, ...]]
"""Which operations a rule applies, for a given model."""


def no_value_ops(config: ModelConfig) -> tuple[ValueOp, ...]:
    """Values pass unchanged."""
    return ()


def plus_one_if_zero_centered(config: ModelConfig) -> tuple[ValueOp, ...]:
    """Norm weights as plain gamma, whatever way the model stores them."""
    return (ValueOp.ADD_ONE,) if config.zero_centered_norm else ()


def composed(ops: Iterable[ValueOp]) -> tuple[ValueOp, ...]:
    """`ops` in order with neighbouring inverses cancelled."""
    result: list[ValueOp] = []
    for op in ops:
        if result and result[-1] is op.inverse:
            result.pop()
        else:
            result.append(op)
    return tuple(result)
