"""Low-rank updates: what merging adapters adds to a weight, as a value of the plan.

The merged tensor is defined element by element, so that neither tiles nor processes can be seen in it::

    sum_ij    = (((b_i0 * a_0j) + b_i1 * a_1j) + ...)      float32, in the order of the rank, each step rounded
    merged_ij = round(base_ij + factor * sum_ij)           float32, then once to the tensor's own element type

A matrix product of a library sums in an order that depends on the shapes it is called with, which is why none is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from dist_export.models.source_tensor import SourceTensor
from dist_export.tensors.dtypes import dtype_by_name
from dist_export.tensors.views import Slab


class LowRankTerm(Struct, frozen=True):
    """``factor * b[b_row : b_row + n] @ a`` added to `n` rows of a slab. `a` is [rank, in], `b` is [any, rank]."""

    rows: tuple[int, int]
    """First row and end of the rows that it is added to."""
    b_row: int
    """The row of `b` that belongs to the first of them."""
    b: SourceTensor
    a: SourceTensor
    factor: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def within(self, rows: tuple[int, int]) -> LowRankTerm | None:
        """The part that concerns `rows`, or None."""
        first, end = max(self.rows[0], rows[0]), min(self.rows[1], rows[1])
        return replace(self, rows=(first, end), b_row=self.b_row + first - self.rows[0]) if first < end else None

    def shifted(self, by: int) -> LowRankTerm:
        """The same for rows that are numbered from `by` on."""
        return replace(self, rows=(self.rows[0] - by, self.rows[1] - by))


class LowRankUpdate(Struct, frozen=True):
    """Everything that is added to a slab. The rows of its terms are disjoint."""

    terms: tuple[LowRankTerm, ...]

    def within(self, rows: tuple[int, int]) -> list[LowRankTerm]:
        """The parts of the terms that concern `rows`."""
        return [part for term in self.terms if (part := term.within(rows)) is not None]

    def num_bytes(self, rows: tuple[int, int]) -> int:
        """Bytes to read for `rows`: of every `b` these rows, of every `a` all of it, once."""
        parts = self.within(rows)
        down = {part.a.slab: part.a for part in parts}.values()
        total = sum(a.shape[0] * a.shape[1] * dtype_by_name(a.dtype).itemsize for a in down)
        return total + sum((p.rows[1] - p.rows[0]) * p.rank * dtype_by_name(p.b.dtype).itemsize for p in parts)


Updates = Mapping[Slab, LowRankUpdate]
"""What is added to which slab; slabs that nothing is added to are not in it."""


def describe(updates: Updates) -> Iterable[str]:
    """Every update as a line of text, in order: for digests."""
    for slab in sorted(updates):
        yield repr((slab, updates[slab]))
