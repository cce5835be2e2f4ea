"""How well quantised weights stand for their originals, measured on a sample of rows while they are encoded.

Which rows are looked at depends on the tensor alone, not on tiles or processes; sums of processes are added in the
order of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from threading import Lock

from msgspec import Struct, field
from msgspec.structs import astuple

Key = tuple[int, int]
"""(file, tensor) in the run."""

FEW_ROWS = 512
"""Tensors of no more rows are measured whole."""
SAMPLED = 64
"""Of larger ones two rows in so many: pairs, since two rows may share a byte."""


def sampled_rows(first: int, end: int, num_rows: int) -> list[int]:
    """Rows of ``first`` to ``end`` that are measured of a weight with `num_rows`, counted from `first`."""
    if num_rows <= FEW_ROWS:
        return list(range(end - first))
    return [row - first for row in range(first, end) if row % SAMPLED < 2]


class Quality(Struct):
    """Sums over the measured elements of a tensor."""

    num_measured: int = 0
    num_saturated: int = 0
    """Nearer to a larger code than there is."""
    signal: float = 0.0
    """Sum of squares of the weights."""
    noise: float = 0.0
    """Sum of squares of what the codes differ by."""
    smallest_scale: float = float("inf")
    largest_scale: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Quality:
        """From its fields as plain numbers."""
        num_measured, num_saturated, *sums = values
        return cls(int(num_measured), int(num_saturated), *sums)

    def add(self, other: Quality) -> None:
        """Put two parts of a tensor together."""
        self.num_measured += other.num_measured
        self.num_saturated += other.num_saturated
        self.signal += other.signal
        self.noise += other.noise
        self.smallest_scale = min(self.smallest_scale, other.smallest_scale)
        self.largest_scale = max(self.largest_scale, other.largest_scale)

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio in dB; None without noise."""
        return round(10 * log10(self.signal / self.noise), 2) if self.noise > 0 and self.signal > 0 else None

    def describe(self) -> dict[str, object]:
        """For the report: rounded, so that the order of the sums does not show."""
        if not self.num_measured:
            return {"scale": None, "snr_db": None, "saturated": None, "num_measured": 0}
        same = self.smallest_scale == self.largest_scale
        return {
            "scale": self.largest_scale if same else [self.smallest_scale, self.largest_scale],
            "snr_db": self.snr_db,
            "saturated": float(f"{self.num_saturated / self.num_measured:.4g}"),
            "num_measured": self.num_measured,
        }


class Qualities(Struct):
    """Those of all tensors that one process encodes. Any thread may add."""

    by_tensor: dict[Key, Quality] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def add(self, key: Key, part: Quality) -> None:
        """Note a part of a tensor."""
        with self._lock:
            self.by_tensor.setdefault(key, Quality()).add(part)

    def plain(self) -> dict[str, list[float]]:
        """As numbers by ``file/tensor``, for JSON."""
        return {f"{file}/{index}": list(astuple(each)) for (file, index), each in self.by_tensor.items()}


def merge(into: dict[str, Quality], plain: Mapping[str, Sequence[float]]) -> None:
    """Add one process's numbers."""
    for key, values in plain.items():
        into.setdefault(key, Quality()).add(Quality.of(values))
