"""The source tensors of a checkpoint under folded names: numbers of layers and experts become holes.

Megatron writes the same weight as one tensor stacked over layers, as one tensor per layer, or per
layer and per expert; which of these is decided by looking at the keys, never by release. Rules name
``decoder.layers.{layer}.…`` and the catalogue finds the slab that holds a given layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from msgspec import Struct, field

from dist_export.errors import Faults
from dist_export.models.low_rank import Updates
from dist_export.models.source_tensor import SourceTensor
from dist_export.tensors.boxes import Shape
from dist_export.tensors.views import Slab

_LAYERS = re.compile(r"^(?P<stack>decoder|mtp)\.layers\.(?:(?P<layer>\d+)\.)?(?P<rest>.*)$")
_EXPERTS = re.compile(r"^(?P<head>.*\.experts\.experts\.)(?:(?P<expert>\d+)\.)?(?P<rest>.*)$")

Position = tuple[int, int]
"""(layer, expert); -1 where the name has no such hole, or where the hole is a dim of the stored tensor."""


class _Stored(Struct, frozen=True):
    """A tensor as stored: which holes of its folded name are leading dims of it."""

    name: str
    shape: Shape
    dtype: str
    num_stacked: int  # leading dims that stand for holes, the last ones of the name

    def prefixes(self) -> Iterator[Shape]:
        """The leading indices of every slab in it."""
        return product(*map(range, self.shape[: self.num_stacked]))

    def holds(self, prefix: Shape) -> bool:
        return all(0 <= index < size for index, size in zip(prefix, self.shape, strict=False))


class _Entry(Struct):
    """All stored tensors of one folded name, by the numbers in their own names."""

    holes: tuple[str, ...]
    stored: dict[Position, _Stored] = field(default_factory=dict)

    def find(self, layer: int, expert: int) -> tuple[_Stored, Shape] | None:
        """The stored tensor and the leading indices that hold a position; at most three look-ups."""
        by_layer, by_expert = "layer" in self.holes, "expert" in self.holes
        wanted = (*((layer,) if by_layer else ()), *((expert,) if by_expert else ()))
        numbers = (layer if by_layer else -1, expert if by_expert else -1)
        for position in (numbers, (numbers[0], -1), (-1, -1)):
            stored = self.stored.get(position)
            if stored is not None:
                prefix = wanted[len(wanted) - stored.num_stacked :]
                if not prefix or stored.holds(prefix):
                    return stored, prefix
        return None

    def largest(self, hole: str) -> int:
        """The largest number seen in a hole, -1 when there is none."""
        if hole not in self.holes:
            return -1
        place, axis = self.holes.index(hole), ("layer", "expert").index(hole)
        return max(
            stored.shape[place - len(self.holes) + stored.num_stacked] - 1 if position[axis] < 0 else position[axis]
            for position, stored in self.stored.items()
        )

    def doubles(self) -> Iterator[tuple[_Stored, _Stored, int]]:
        """Two tensors that hold the same layer: a stacked one and one with that number in its name."""
        for position, stored in self.stored.items():
            for wider in {(position[0], -1), (-1, -1)} - {position}:
                other = self.stored.get(wider)
                if other is not None and other.holds(self._within(position, other)):
                    yield stored, other, position[0]

    def _within(self, position: Position, other: _Stored) -> Shape:
        """Leading indices in `other` of the first slab at `position`."""
        named = [n for n, hole in zip(position, ("layer", "expert"), strict=True) if hole in self.holes]
        return tuple(max(n, 0) for n in named[len(named) - other.num_stacked :])


class SourceCatalog(Struct):
    """Folded name -> stored tensors. Built once per run from names, shapes and dtypes.

    A tensor stacked over layers and experts is one entry whatever their number; slabs are made when asked for.
    """

    tensors: Mapping[str, tuple[Shape, str]]
    """Global name -> (shape, dtype name), weights only."""
    num_layers: int = 0
    """Layers seen under ``decoder.layers``."""
    updates: Updates = field(default_factory=dict)
    """What adapters add to slabs before anything else is made of them."""
    _entries: dict[str, _Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = Faults("layers of the checkpoint")
        for name, (shape, dtype) in self.tensors.items():
            self._enter(name, shape, dtype, faults)
        for entry in self._entries.values():
            faults.extend(f"{a.name} and {b.name} both hold layer {layer}" for a, b, layer in entry.doubles())
        decoder = [entry for name, entry in self._entries.items() if name.startswith("decoder.layers.")]
        faults.raise_if_any()
        self.num_layers = max((entry.largest("layer") + 1 for entry in decoder), default=0)

    def patterns(self) -> Iterable[str]:
        """All folded names."""
        return self._entries.keys()

    def names(self, pattern: str) -> set[str]:
        """The stored tensors behind a folded name."""
        entry = self._entries.get(pattern)
        return {stored.name for stored in entry.stored.values()} if entry else set()

    def find(self, pattern: str, *, layer: int = -1, expert: int = -1) -> SourceTensor | None:
        """The tensor of `pattern` at a layer and expert, or None when the checkpoint has none there."""
        entry = self._entries.get(pattern)
        found = entry.find(layer, expert) if entry else None
        if found is None:
            return None
        stored, prefix = found
        return SourceTensor(Slab(stored.name, prefix), stored.shape[stored.num_stacked :], stored.dtype)

    def folded_shapes(self) -> dict[str, Shape]:
        """Folded name -> shape of one layer (of one expert): of the first that is there."""
        return {
            pattern: stored.shape[stored.num_stacked :]
            for pattern, entry in self._entries.items()
            for stored in [entry.stored[min(entry.stored)]]
        }

    def dtype(self, pattern: str) -> str:
        """Element type of a folded name; several are joined with a comma."""
        return ", ".join(sorted({stored.dtype for stored in self._entries[pattern].stored.values()}))

    def slabs(self) -> Iterator[Slab]:
        """Every slab of the checkpoint's model tensors."""
        for entry in self._entries.values():
            for stored in entry.stored.values():
                yield from (Slab(stored.name, prefix) for prefix in stored.prefixes())

    def num_experts(self) -> int:
        """Experts seen, 0 for a dense model."""
        return max((entry.largest("expert") + 1 for entry in self._entries.values()), default=0)

    def _enter(self, name: str, shape: Shape, dtype: str, faults: Faults) -> None:
        pattern, fixed, holes = fold(name)
        stacked = [hole for hole in holes if fixed[hole] < 0]
        if len(stacked) > len(shape):
            faults.add(f"{name}: shape {list(shape)} has no dim for {' and '.join(stacked)}")
            return
        if holes and stacked and stacked != holes[len(holes) - len(stacked) :]:
            faults.add(f"{name}: stacked over layers but numbered by expert, which no Megatron release writes")
            return
        entry = self._entries.get(pattern)
        if entry is None:
            entry = self._entries[pattern] = _Entry(tuple(holes))
        stored = _Stored(name, shape, dtype, len(stacked))
        position = (fixed["layer"], fixed["expert"])
        double = entry.stored.setdefault(position, stored)
        if double is not stored:
            faults.add(f"{name} and {double.name} both hold layer {position[0]}")


def fold(name: str) -> tuple[str, dict[str, int], list[str]]:
    """A name with holes, the numbers that were in it (-1 for none), and the holes in order.

    >>> fold("decoder.layers.3.mlp.linear_fc1.weight")
    ('decoder.layers.{layer}.mlp.linear_fc1.weight', {'layer': 3, 'expert': -1}, ['layer'])
    """
    numbers, holes = {"layer": -1, "expert": -1}, []
    match = _LAYERS.match(name)
    if match:
        holes.append("layer")
        numbers["layer"] = int(match["layer"]) if match["layer"] else -1
        name = f"{match['stack']}.layers.{{layer}}.{match['rest']}"
    match = _EXPERTS.match(name)
    if match:
        holes.append("expert")
        numbers["expert"] = int(match["expert"]) if match["expert"] else -1
        name = f"{match['head']}{{expert}}.{match['rest']}"
    return name, numbers, holes
