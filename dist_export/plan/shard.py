"""The plan of one target shard: every tensor of one output file, made from metadata alone."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dist_export.errors import ExportError, Faults
from dist_export.models.logical import LogicalModel, LogicalTensor
from dist_export.models.rules import Input, Scope, TargetRule
from dist_export.models.value_ops import ValueOp, composed
from dist_export.plan.layout import TargetLayout
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import DType, dtype_by_name
from dist_export.tensors.safetensors_format import DATA_ALIGNMENT, build_header
from dist_export.tensors.views import View, concatenate, stack


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of an output file: where it goes, which pieces of the source it is made of, what is done to them."""

    name: str
    dtype: DType
    view: View
    source_dtype: DType
    """Element type of every source piece."""
    values: tuple[ValueOp, ...]
    transposed: bool = False
    """Stored with its two dims exchanged; `view` describes it before that."""
    offset: int = 0  # bytes from the start of the data section

    @property
    def shape(self) -> Shape:
        """As stored."""
        return self.view.shape[::-1] if self.transposed else self.view.shape

    @property
    def num_bytes(self) -> int:
        """Size in the output file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def moves_only(self) -> bool:
        """Whether bytes are only moved: no arithmetic, no cast. A transposition moves bytes too."""
        return not self.values and self.dtype == self.source_dtype

    @property
    def steps(self) -> tuple[str, ...]:
        """The value operations in order, for people and digests."""
        cast = () if self.dtype == self.source_dtype else (f"cast {self.source_dtype} to {self.dtype}",)
        transposition = ("transpose",) if self.transposed else ()
        return tuple(op.value for op in self.values) + cast + transposition


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Everything one output file will hold. Made from the same inputs, it has the same `digest` everywhere."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def header(self) -> bytes:
        """The safetensors header, known before the first byte is read."""
        return build_header(
            ((t.name, t.dtype, t.shape, t.offset) for t in self.tensors), metadata={"format": "pt"}
        )

    @property
    def num_data_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    def digest(self) -> str:
        """SHA-256 over the whole plan, hexadecimal."""
        state = hashlib.sha256(self.file_name.encode())
        for tensor in self.tensors:
            line = (tensor.name, str(tensor.dtype), tensor.shape, tensor.offset, tensor.steps)
            state.update(repr(line).encode())
            for piece in tensor.view.pieces:
                state.update(repr((piece.box.start, piece.box.size, str(piece.slab), piece.source_start)).encode())
        return state.hexdigest()


def place(tensors: Iterable[PlannedTensor], file_name: str) -> ShardPlan:
    """Give every tensor its offset.

    Tensors whose size is a multiple of a larger power of two come first (up to a page), so that large
    tensors start on page boundaries; within that the order is the rules' own.
    """
    ordered = sorted(tensors, key=lambda tensor: -math.gcd(tensor.num_bytes, DATA_ALIGNMENT))
    placed, offset = [], 0
    for tensor in ordered:
        placed.append(replace(tensor, offset=offset))
        offset += tensor.num_bytes
    return ShardPlan(file_name, tuple(placed))


@dataclass(frozen=True, slots=True)
class _Instance:
    """A rule at one place: global layer and expert, -1 where its name has no such hole."""

    rule: TargetRule
    name: str
    layer: int = -1
    expert: int = -1


@dataclass(frozen=True, slots=True)
class ShardPlanner:
    """Makes the plan of any rank of a layout from a target's table and a model's logical tensors."""

    rules: tuple[TargetRule, ...]
    logical: LogicalModel
    layout: TargetLayout
    dtype: DType
    """Element type of tensors whose rule fixes none."""

    def plan(self, rank: int, *, file_name: str, faults: Faults) -> ShardPlan:
        """Target `rank` as one file. Problems are added to `faults`; the tensors they touch are left out."""
        return place(self.tensors(rank, faults=faults), file_name)

    def tensors(self, rank: int, *, faults: Faults) -> list[PlannedTensor]:
        """Every tensor of target `rank`, not yet placed in a file."""
        tensors = []
        for instance in self._instances(rank):
            try:
                tensors.append(self._tensor(instance, rank))
            except ExportError as error:
                faults.add(f"rank {rank}: {instance.name}: {error}")
        counts = Counter(tensor.name for tensor in tensors)
        faults.extend(f"rank {rank}: {name} is written {n} times" for name, n in counts.items() if n > 1)
        return tensors

    def _instances(self, rank: int) -> Iterator[_Instance]:
        """Every tensor that `rank` holds."""
        config, stage = self.logical.config, self.layout.pp_rank(rank)
        rules = [rule for rule in self.rules if rule.when(config)]
        if stage == 0:
            yield from (_Instance(rule, rule.target) for rule in rules if rule.scope is Scope.FIRST)
        for local, layer in enumerate(self.layout.layers(rank)):
            for rule in rules:
                if rule.scope is Scope.LAYER:
                    name = rule.target.replace("{layer}", str(local))
                    experts = range(config.num_experts) if "{expert}" in name else (-1,)
                    yield from (_Instance(rule, name.replace("{expert}", str(e)), layer, e) for e in experts)
        if stage == self.layout.pp_size - 1:
            yield from (_Instance(rule, rule.target) for rule in rules if rule.scope is Scope.LAST)

    def _tensor(self, instance: _Instance, rank: int) -> PlannedTensor:
        rule, layer, name = instance.rule, instance.layer, instance.name
        config, tp = self.logical.config, self.layout.tensor_parallel(rank)
        experts = range(instance.expert, instance.expert + 1)
        if rule.over_experts:
            experts = self.layout.experts(rank, config.num_experts)
            tp = self.layout.expert_tensor_parallel(rank)
        found = [[self._input(part, layer, expert) for part in rule.inputs] for expert in experts]
        real = [tensor for parts in found for tensor in parts if tensor.dtype]
        dtypes = {tensor.dtype for tensor in real}
        values = {tensor.values for tensor in real}
        if len(dtypes) > 1 or len(values) > 1:
            raise ExportError(f"its parts differ in the checkpoint: element types {sorted(dtypes)}; save them alike")
        dtype = dtype_by_name(rule.dtype) if rule.dtype else self.dtype
        source_dtype = dtype_by_name(dtypes.pop(), where=name) if dtypes else dtype
        joined = [
            concatenate([i.shard.take(t.view, tp, config) for i, t in zip(rule.inputs, parts, strict=True)], 0)
            for parts in found
        ]
        ops = (*(values.pop() if values else ()), *rule.values(config))
        view = stack(joined) if rule.over_experts else joined[0]
        return PlannedTensor(name, dtype, view, source_dtype, composed(ops), rule.transposed)

    def _input(self, part: Input, layer: int, expert: int) -> LogicalTensor:
        """The logical tensor of an input, or zeros (with no element type of their own) where the rule allows."""
        tensor = self.logical.find(part.logical, layer=layer, expert=expert)
        if tensor is not None:
            return tensor
        like = self.logical.find(part.zeros_for, layer=layer, expert=expert) if part.zeros_for else None
        if like is None:
            where = f" of layer {layer}" if layer >= 0 else ""
            where += f", expert {expert}" if expert >= 0 else ""
            names = " or ".join(self.logical.sources_of(part.logical)) or f"a source for {part.logical}"
            raise ExportError(f"missing tensor{where}: the checkpoint has no {names}")
        return LogicalTensor(View.zeros(like.view.shape[:1]), "", ())
