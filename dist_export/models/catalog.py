"""The source tensors of a checkpoint under folded names: numbers of layers and experts become holes.

Megatron writes the same weight as one tensor stacked over layers, as one tensor per layer, or per
layer and per expert; which of these is decided by looking at the keys, never by release. Rules name
``decoder.layers.{layer}.…`` and the catalogue finds the slab that holds a given layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from dist_export.errors import Faults
from dist_export.tensors.boxes import Shape
from dist_export.tensors.views import Slab

_LAYERS = re.compile(r"^(?P<stack>decoder|mtp)\.layers\.(?:(?P<layer>\d+)\.)?(?P<rest>.*)$")
_EXPERTS = re.compile(r"^(?P<head>.*\.experts\.experts\.)(?:(?P<expert>\d+)\.)?(?P<rest>.*)$")

Position = tuple[int, int]
"""(layer, expert); -1 where the name has no such hole."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Where one layer's (and expert's) tensor lies, with the shape that is left after the fixed dims."""

    slab: Slab
    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as stored: which holes of its folded name are leading dims of it."""

    name: str
    shape: Shape
    dtype: str
    num_stacked: int  # leading dims that stand for holes


@dataclass(slots=True)
class SourceCatalog:
    """Folded name -> position -> stored tensor. Built once per run from names, shapes and dtypes."""

    tensors: Mapping[str, tuple[Shape, str]]
    """Global name -> (shape, dtype name), weights only."""
    num_layers: int = 0
    """Layers seen under ``decoder.layers``."""
    _entries: dict[str, dict[Position, _Stored]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = Faults("layers of the checkpoint")
        for name, (shape, dtype) in self.tensors.items():
            self._enter(name, shape, dtype, faults)
        self.num_layers = max((layer + 1 for layer, _ in self._decoder_positions()), default=0)
        faults.raise_if_any()

    def patterns(self) -> Iterable[str]:
        """All folded names."""
        return self._entries.keys()

    def names(self, pattern: str) -> set[str]:
        """The stored tensors behind a folded name."""
        return {stored.name for stored in self._entries.get(pattern, {}).values()}

    def find(self, pattern: str, *, layer: int = -1, expert: int = -1) -> SourceTensor | None:
        """The tensor of `pattern` at a layer and expert, or None when the checkpoint has none there."""
        positions = self._entries.get(pattern)
        if not positions:
            return None
        wanted = (layer if "{layer}" in pattern else -1, expert if "{expert}" in pattern else -1)
        stored = positions.get(wanted)
        if stored is None:
            return None
        prefix = self._prefix(pattern, wanted, stored)
        return SourceTensor(Slab(stored.name, prefix), stored.shape[stored.num_stacked :], stored.dtype)

    def folded_shapes(self) -> dict[str, Shape]:
        """Folded name -> shape of one layer (of one expert): of the first that is there."""
        return {
            pattern: stored.shape[stored.num_stacked :]
            for pattern, positions in self._entries.items()
            for stored in [next(iter(positions.values()))]
        }

    def dtype(self, pattern: str) -> str:
        """Element type of a folded name; several are joined with a comma."""
        return ", ".join(sorted({stored.dtype for stored in self._entries[pattern].values()}))

    def slabs(self) -> Iterator[Slab]:
        """Every slab of the checkpoint's model tensors."""
        for pattern, positions in self._entries.items():
            for (layer, expert), stored in positions.items():
                yield Slab(stored.name, self._prefix(pattern, (layer, expert), stored))

    def num_experts(self) -> int:
        """Experts seen, 0 for a dense model."""
        return max((e + 1 for p in self._entries.values() for _, e in p), default=0)

    def _decoder_positions(self) -> Iterable[Position]:
        return (p for name, ps in self._entries.items() if name.startswith("decoder.layers.") for p in ps)

    @staticmethod
    def _prefix(pattern: str, wanted: Position, stored: _Stored) -> Shape:
        """The leading indices that hold `wanted`: the last `num_stacked` of the holes are dims."""
        holes = [index for index in wanted if index >= 0]
        return tuple(holes[len(holes) - stored.num_stacked :]) if stored.num_stacked else ()

    def _enter(self, name: str, shape: Shape, dtype: str, faults: Faults) -> None:
        pattern, fixed, holes = fold(name)
        stacked = [hole for hole in holes if fixed[hole] < 0]
        if len(stacked) > len(shape):
            faults.add(f"{name}: shape {list(shape)} has no dim for {' and '.join(stacked)}")
            return
        if holes and stacked and stacked != holes[len(holes) - len(stacked) :]:
            faults.add(f"{name}: stacked over layers but numbered by expert, which no Megatron release writes")
            return
        stored = _Stored(name, shape, dtype, len(stacked))
        ranges = {hole: range(size) for hole, size in zip(stacked, shape, strict=False)}
        layers = ranges.get("layer", [fixed["layer"]])
        experts = ranges.get("expert", [fixed["expert"]])
        positions = self._entries.setdefault(pattern, {})
        for position in ((layer, expert) for layer in layers for expert in experts):
            if position in positions:
                faults.add(f"{name} and {positions[position].name} both hold layer {position[0]}")
                return
            positions[position] = stored


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
