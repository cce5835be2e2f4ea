"""Gate and up that Megatron saved apart are the two halves of the tensor that it saves otherwise, in every family."""

from __future__ import annotations

import pytest

from dist_export.families.registry import FAMILIES
from dist_export.models.layout_ops import SPLIT_HALVES
from dist_export.models.rules import Family, SourceRule


def halves(rules: tuple[SourceRule, ...]) -> dict[str, tuple[str, ...]]:
    """Source of a whole fc1 -> what its first and its second half are."""
    return {rule.source: rule.logical for rule in rules if rule.op == SPLIT_HALVES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_halves_under_names_of_their_own(family: Family) -> None:
    """``singleton_local_shards``: ``_w`` is the first half of the rows, ``_v`` the second (megatron/core/transformer/
    mlp.py, ``apply_swiglu_sharded_factory``)."""
    whole = halves(family.source_rules)
    apart = {rule.source: rule.logical for rule in family.source_rules if rule.source[-2:] in ("_w", "_v")}
    assert apart == {f"{name}_{half}": (logical[part],) for name, logical in whole.items()
                     for part, half in enumerate("wv")}  # fmt: skip
    assert all(first.replace(".gate.", ".up.") == second != first for first, second in whole.values())
