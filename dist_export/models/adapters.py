"""Adapters by name -> what they add to which source slab.

An adapter of the module ``X`` is ``X.adapter.linear_in.weight`` (A, [rank, in]) and ``X.adapter.linear_out.weight`` (B,
[out, rank]); ``alpha / rank * B @ A`` is added to ``X.weight`` (megatron/bridge/peft/utils.py,
`ParallelLinearAdapter.forward`; peft/lora_merge.py, `LoRAMerge.merge`; NeMo 2 nemo/collections/llm/peft/utils.py,
`ParallelLinearAdapter`, and peft/lora.py, `LoRAMerge`). In a distributed checkpoint both are whole, whatever the tensor
parallel sizes, with the rows of B in the order of the base's rows, with these exceptions:

- `CanonicalLoRA` has ``X.adapter.adapter_q`` (``_k``, ``_v``, ``_gate``, ``_up``) instead, each a part of the rows
  (peft/canonical_lora.py, `LoRALinearSplitQKV`, `LoRALinearSplitFC1UpGate`);
- B of ``linear_fc1`` is saved as if it were gate and up, the halves of every tensor parallel rank apart
  (megatron/core/transformer/mlp.py, `apply_swiglu_sharded_factory`), also where it is only one of the two or the MLP is
  not gated (`ParallelLinearAdapter.sharded_state_dict`; Megatron-Bridge stopped the latter with 0.5.1);
- adapters of grouped experts have a leading dim of experts, are shared by all of them, or one side of each
  (peft/utils.py, `ParallelLinearAdapter._apply_expert_axis_factory`, `GroupedExpertLinearAdapter`,
  `SharedOuterGroupedExpertAdapter`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

from msgspec import Struct, field

from dist_export.checkpoint.adapters import AdapterSettings, adapter_names
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import ExportError, Faults
from dist_export.models.adapter_rows import Placed, RowOrder, placed_rows
from dist_export.models.catalog import Position, SourceCatalog, fold
from dist_export.models.config import ModelConfig
from dist_export.models.low_rank import LowRankTerm, LowRankUpdate, Updates
from dist_export.models.source_tensor import SourceTensor
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32
from dist_export.tensors.views import Slab

_NAME = re.compile(r"^(?P<module>.+)\.adapter(?:\.adapter_(?P<part>q|k|v|gate|up))?\.linear_(?P<side>in|out)\.weight$")
_DTYPES = frozenset(dtype.name for dtype in (FLOAT32, FLOAT16, BFLOAT16))


class _Side(Struct):
    """A or B of a module's adapters: the stored tensors by the numbers in their names."""

    holes: list[str]
    stored: dict[Position, tuple[str, Shape, str]] = field(default_factory=dict)

    def find(self, layer: int, expert: int) -> SourceTensor | None:
        """The matrix at a place. One without a dim for experts is that of all of them."""
        for position in dict.fromkeys(((layer, expert), (layer, -1), (-1, expert), (-1, -1))):
            if position in self.stored:
                name, shape, dtype = self.stored[position]
                prefix = self._prefix(position, layer, expert)[: len(shape) - 2]
                inside = all(index < size for index, size in zip(prefix, shape, strict=False))
                return SourceTensor(Slab(name, prefix), shape[len(prefix) :], dtype) if inside else None
        return None

    def numbers(self, hole: str) -> set[int]:
        """The layers or experts that it has matrices for; empty when those of experts are shared."""
        found: set[int] = set()
        for position, (_, shape, _) in self.stored.items():
            number = position[("layer", "expert").index(hole)]
            stacked = [h for h in self.holes if position[("layer", "expert").index(h)] < 0]
            place = stacked.index(hole) if hole in stacked else len(shape)
            found |= {number} if number >= 0 else set(range(shape[place] if place < len(shape) - 2 else 0))
        return found

    def slabs(self) -> Iterator[tuple[str, int]]:
        """(name, number of matrices in it)."""
        for name, shape, _ in self.stored.values():
            count = 1
            for size in shape[:-2]:
                count *= size
            yield name, count

    def _prefix(self, position: Position, layer: int, expert: int) -> Shape:
        numbers = {"layer": (position[0], layer), "expert": (position[1], expert)}
        return tuple(numbers[hole][1] for hole in self.holes if numbers[hole][0] < 0)


_Key = tuple[str, str]
"""Folded name of a module, and which part of its rows (``q``, ``gate``; empty for all)."""


class _Reader(Struct):
    """Finds what belongs together and what it adds."""

    index: CheckpointIndex
    settings: AdapterSettings
    catalog: SourceCatalog
    config: ModelConfig
    faults: Faults
    sides: dict[_Key, dict[str, _Side]] = field(default_factory=lambda: defaultdict(dict))
    used: set[Slab] = field(default_factory=set)
    terms: dict[Slab, list[LowRankTerm]] = field(default_factory=lambda: defaultdict(list))

    def collect(self) -> None:
        """Sort the tensors by module and side."""
        for name in adapter_names(self.index):
            pattern, numbers, holes = fold(name)
            match, info = _NAME.match(pattern), self.index.tensors[name]
            if match is None:
                self.faults.add(f"{name}: not the name of a LoRA matrix (linear_in.weight, linear_out.weight)")
            elif len(info.shape) < 2 or info.dtype not in _DTYPES:
                self.faults.add(f"{name}: {info.dtype} {list(info.shape)}, expected a matrix of {sorted(_DTYPES)}")
            else:
                side = self.sides[match["module"], match["part"] or ""].setdefault(match["side"], _Side(holes))
                position = (numbers["layer"], numbers["expert"])
                double = side.stored.setdefault(position, (name, info.shape, info.dtype))
                if double[0] != name:
                    self.faults.add(f"{name} and {double[0]} are the same matrix")

    def read(self) -> None:
        """The terms of every module."""
        for (module, part), sides in self.sides.items():
            if set(sides) != {"in", "out"}:
                lacking = "linear_out" if "in" in sides else "linear_in"
                self.faults.add(f"{module}: its adapter{part and ' ' + part} has no {lacking}.weight")
                continue
            for layer, expert in self._places(module, sides):
                try:
                    self._read_place((module, part), sides, layer, expert)
                except ExportError as error:
                    self.faults.add(str(error))
        self._check_used()

    def _places(self, module: str, sides: dict[str, _Side]) -> Iterator[Position]:
        layers = set.union(*(side.numbers("layer") for side in sides.values())) if "{layer}" in module else {-1}
        experts = set.union(*(side.numbers("expert") for side in sides.values())) if "{expert}" in module else {-1}
        experts = experts or set(range(self.catalog.num_experts()))
        return ((layer, expert) for layer in sorted(layers) for expert in sorted(experts))

    def _read_place(self, key: _Key, sides: dict[str, _Side], layer: int, expert: int) -> None:
        module, part = key
        a, b = sides["in"].find(layer, expert), sides["out"].find(layer, expert)
        where = module.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        if a is None or b is None:
            raise ExportError(f"{where}: its adapter{part and ' ' + part} has only one of linear_in and linear_out")
        self.used |= {a.slab, b.slab}
        bases = self._bases(module, layer, expert)
        if not bases:
            raise ExportError(f"{where}: has an adapter, but the base has no {where}.weight")
        self._check_shapes(where, a, b, bases)
        num_rows = sum(base.shape[0] for base in bases)
        order = RowOrder(self.config, self.settings, is_expert="{expert}" in module)
        for placed in placed_rows(order, where, part, num_rows, b, partial(self._row_starts, b)):
            self._add(bases, self._term(a, b, placed))

    def _bases(self, module: str, layer: int, expert: int) -> list[SourceTensor]:
        """The weight of a module, or its two halves where gate and up are apart."""
        names = (f"{module}.weight",), (f"{module}.weight_w", f"{module}.weight_v")
        for group in names:
            found = [self.catalog.find(name, layer=layer, expert=expert) for name in group]
            if all(found):
                return [tensor for tensor in found if tensor]
        return []

    def _check_shapes(self, where: str, a: SourceTensor, b: SourceTensor, bases: list[SourceTensor]) -> None:
        settings, base = self.settings, bases[0]
        if any(len(tensor.shape) != 2 for tensor in (a, b, *bases)) or base.dtype not in _DTYPES:
            shapes = f"linear_in {list(a.shape)} and linear_out {list(b.shape)}"
            raise ExportError(f"{where}: a {base.dtype} weight {list(base.shape)} and an adapter of {shapes}")
        rank = a.shape[0]
        if a.shape[1] != base.shape[1] or b.shape[1] != rank:
            raise ExportError(
                f"{where}: an adapter of linear_in {list(a.shape)} and linear_out {list(b.shape)} does not fit the "
                f"base's weight {list(base.shape)}"
            )
        if rank != settings.dim and not (settings.normalized_experts and ".experts." in where):
            raise ExportError(f"{where}: an adapter of rank {rank}, {settings.origin} says dim {settings.dim}")

    def _row_starts(self, b: SourceTensor) -> list[int]:
        """Where the rows of `b` were cut when they were saved."""
        chunks = self.index.chunks(b.slab.name, b.slab.box(b.shape))
        return sorted({chunk.box.start[len(b.slab.prefix)] for chunk in chunks})

    def _term(self, a: SourceTensor, b: SourceTensor, placed: Placed) -> LowRankTerm:
        rows = (placed.base, placed.base + placed.num_rows)
        return LowRankTerm(rows, placed.stored, b, a, self.settings.alpha / a.shape[0])

    def _add(self, bases: list[SourceTensor], term: LowRankTerm) -> None:
        first = 0
        for base in bases:
            part = term.within((first, first + base.shape[0]))
            if part is not None:
                self.terms[base.slab].append(part.shifted(first))
            first += base.shape[0]

    def _check_used(self) -> None:
        counts: dict[str, int] = defaultdict(int)
        for slab in self.used:
            counts[slab.name] += 1
        for sides in self.sides.values():
            for side in sides.values():
                for name, count in side.slabs():
                    if counts[name] != count and not self.faults:
                        self.faults.add(f"{name}: {count - counts[name]} of its {count} matrices belong to nothing")


def updates_of(
    index: CheckpointIndex, settings: AdapterSettings, catalog: SourceCatalog, config: ModelConfig
) -> Updates:
    """What the adapters in `index` add to the slabs of `catalog`. Pure: reads no file.

    One `ExportError` names everything that does not fit: adapters without a base tensor, of other shapes, of which one
    matrix is missing, several for the same rows, and rows whose order cannot be told.
    """
    faults = Faults("adapters cannot be merged")
    if settings.glu_interleaved and any(".linear_fc1." in name for name in adapter_names(index)):
        faults.add(f"{settings.origin}: training interleaved gate and up, which adapters of linear_fc1 do not tell")
    reader = _Reader(index, settings, catalog, config, faults)
    reader.collect()
    reader.read()
    updates: dict[Slab, LowRankUpdate] = {}
    for slab, terms in reader.terms.items():
        ordered = sorted(terms, key=lambda term: term.rows)
        if any(left.rows[1] > right.rows[0] for left, right in pairwise(ordered)):
            faults.add(f"{slab}: two adapters for the same rows")
        updates[slab] = LowRankUpdate(tuple(ordered))
    faults.raise_if_any()
    return updates
