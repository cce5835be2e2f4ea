"""The plan of one target shard: every tensor of one output file, made from metadata alone."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Protocol

from msgspec import Struct, msgpack
from msgspec.structs import replace

from dist_export.errors import ExportError, Faults
from dist_export.models.logical import LogicalModel, LogicalTensor
from dist_export.models.rules import Input, Scope, TargetRule
from dist_export.models.shard_ops import TensorParallel
from dist_export.models.value_ops import ValueOp, composed
from dist_export.plan.layout import TargetLayout
from dist_export.plan.recipes import FOLLOWS_WEIGHT, Absorbed, Encoded, Recipe, described
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import DType, dtype_by_name
from dist_export.tensors.safetensors_format import DATA_ALIGNMENT, build_header
from dist_export.tensors.views import View, concatenate, stack


class PlannedTensor(Struct, frozen=True):
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
    recipe: Recipe | None = None
    """What is made of the view where that is more than moving and casting elements."""
    interleaved: bool = False
    """The two halves of dim 1 alternate in the file, before a transposition."""

    @property
    def shape(self) -> Shape:
        """As stored."""
        if self.recipe is not None:
            return self.recipe.stored_shape(self.view.shape)
        shape = self.view.shape
        return (*shape[:-2], *shape[:-3:-1]) if self.transposed else shape

    @property
    def is_permuted(self) -> bool:
        """Whether whole slices along the leading dim (heads, where keys are absorbed) are put in order or made at a
        time, apart from the stream of tiles."""
        permuted = self.interleaved or (self.transposed and len(self.view.shape) > 2)
        return permuted or isinstance(self.recipe, Absorbed)

    @property
    def is_small(self) -> bool:
        """Whether the tensor is made apart from the stream of weights: scales, and norms that take over a factor."""
        return self.recipe is not None and not isinstance(self.recipe, (*FOLLOWS_WEIGHT, Absorbed))

    @property
    def packing(self) -> tuple[int, int | Fraction]:
        """Rows and columns of the view that become one stored row and column; half a column where one holds two."""
        return (self.recipe.codes.rows, self.recipe.codes.columns) if isinstance(self.recipe, Encoded) else (1, 1)

    @property
    def num_bytes(self) -> int:
        """Size in the output file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def moves_only(self) -> bool:
        """Whether bytes are only moved: no arithmetic, no cast. A transposition moves bytes too."""
        return not self.values and self.dtype == self.source_dtype and self.recipe is None

    @property
    def steps(self) -> tuple[str, ...]:
        """The value operations in order, for people and digests."""
        cast = () if self.dtype == self.source_dtype else (f"cast {self.source_dtype} to {self.dtype}",)
        transposition = ("interleave",) * self.interleaved + ("transpose",) * self.transposed
        recipe = () if self.recipe is None else (described(self.recipe),)
        return tuple(op.value for op in self.values) + cast + transposition + recipe


class ShardPlan(Struct, frozen=True):
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

    @property
    def num_pieces(self) -> int:
        """Of the views of all tensors."""
        return sum(len(tensor.view.pieces) for tensor in self.tensors)

    def digest(self) -> str:
        """SHA-256 over the whole plan, hexadecimal."""
        state = hashlib.sha256(self.file_name.encode())
        for tensor in self.tensors:
            line = (tensor.name, str(tensor.dtype), tensor.shape, tensor.offset, tensor.steps)
            state.update(repr((line, tensor.recipe)).encode())
            state.update(msgpack.encode(tensor.view))
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


class _Instance(Struct, frozen=True):
    """A rule at one place: global layer and expert, -1 where its name has no such hole."""

    rule: TargetRule
    name: str
    layer: int = -1
    expert: int = -1


class Part(Struct, frozen=True):
    """A logical tensor within a target tensor, and how it was cut."""

    input: Input
    tensor: LogicalTensor
    expert: int


class Resolved(Struct, frozen=True):
    """A target tensor before anything is joined: the parts of every slice along its leading dim."""

    rule: TargetRule
    name: str
    layer: int
    slices: tuple[tuple[Part, ...], ...]
    """One per expert where the tensor is stacked over experts, else a single one."""
    tp: TensorParallel

    def joined(self, views: Iterable[Sequence[View]]) -> View:
        """What the slices' views become together."""
        joined = [concatenate(list(parts), 0) for parts in views]
        return stack(joined) if self.rule.over_experts else joined[0]


class TensorQuantizer(Protocol):
    """Makes of a planned weight what is written for it when it is quantised."""

    def tensors(self, planned: PlannedTensor, resolved: Resolved) -> list[PlannedTensor]:
        """The weight's codes and its scales, or the tensor as it is. Raises `ExportError`."""


class ShardPlanner(Struct, frozen=True):
    """Makes the plan of any rank of a layout from a target's table and a model's logical tensors."""

    rules: tuple[TargetRule, ...]
    logical: LogicalModel
    layout: TargetLayout
    dtype: DType
    """Element type of tensors whose rule fixes none."""
    quantizer: TensorQuantizer | None = None

    def plan(self, rank: int, *, file_name: str, faults: Faults) -> ShardPlan:
        """Target `rank` as one file. Problems are added to `faults`; the tensors they touch are left out."""
        return place(self.tensors(rank, faults=faults), file_name)

    def tensors(self, rank: int, *, faults: Faults) -> list[PlannedTensor]:
        """Every tensor of target `rank`, not yet placed in a file."""
        tensors = []
        for instance in self._instances(rank):
            try:
                tensors += self._tensors(self._resolve(instance, rank))
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
                if rule.scope is Scope.LAYER and rule.layers(config, layer):
                    yield from self._of_layer(rule, local, layer)
        if stage == self.layout.pp_size - 1:
            yield from (_Instance(rule, rule.target) for rule in rules if rule.scope is Scope.LAST)
            for layer in range(config.num_mtp_layers):
                for rule in rules:
                    if rule.scope is Scope.MTP:
                        yield from self._of_layer(rule, config.num_layers + layer, layer)

    def _of_layer(self, rule: TargetRule, number: int, layer: int) -> Iterator[_Instance]:
        """The tensors of a rule in a layer that the target calls `number`."""
        name = rule.target.replace("{layer}", str(number))
        experts = range(self.logical.config.num_experts) if "{expert}" in name else (-1,)
        return (_Instance(rule, name.replace("{expert}", str(e)), layer, e) for e in experts)

    def _resolve(self, instance: _Instance, rank: int) -> Resolved:
        rule, layer = instance.rule, instance.layer
        tp = self.layout.tensor_parallel(rank)
        experts = range(instance.expert, instance.expert + 1)
        if rule.over_experts:
            experts = self.layout.experts(rank, self.logical.config.num_experts)
            tp = self.layout.expert_tensor_parallel(rank)
        slices = tuple(
            tuple(Part(part, self._input(part, layer, expert), expert) for part in rule.inputs) for expert in experts
        )
        return Resolved(rule, instance.name, layer, slices, tp)

    def _tensors(self, resolved: Resolved) -> list[PlannedTensor]:
        planned = self._tensor(resolved)
        return [planned] if self.quantizer is None else self.quantizer.tensors(planned, resolved)

    def _absorbed(self, resolved: Resolved) -> PlannedTensor:
        """Queries that take the keys in: the view is the queries', the keys are beside it."""
        config, (parts,) = self.logical.config, resolved.slices
        assert self.quantizer is None, "quantised latent attention is refused before"
        queries, keys = (part.input.shard.take(part.tensor.view, resolved.tp, config) for part in parts)
        dtypes = [dtype_by_name(part.tensor.dtype, where=resolved.name) for part in parts]
        num_heads = config.num_attention_heads // resolved.tp.size
        recipe = Absorbed(keys, dtypes[1], num_heads, config.qk_nope_head_size)
        return PlannedTensor(resolved.name, self.dtype, queries, dtypes[0], (), recipe=recipe)

    def _tensor(self, resolved: Resolved) -> PlannedTensor:
        if resolved.rule.absorbed:
            return self._absorbed(resolved)
        rule, name, config = resolved.rule, resolved.name, self.logical.config.of_layer(resolved.layer)
        real = [part.tensor for parts in resolved.slices for part in parts if part.tensor.dtype]
        dtypes = {tensor.dtype for tensor in real}
        values = {tensor.values for tensor in real}
        if len(dtypes) > 1 or len(values) > 1:
            raise ExportError(f"its parts differ in the checkpoint: element types {sorted(dtypes)}; save them alike")
        dtype = dtype_by_name(rule.dtype) if rule.dtype else self.dtype
        source_dtype = dtype_by_name(dtypes.pop(), where=name) if dtypes else dtype
        view = resolved.joined(
            [part.input.shard.take(part.tensor.view, resolved.tp, config) for part in parts]
            for parts in resolved.slices
        )
        ops = (*(values.pop() if values else ()), *rule.values(config))
        steps = composed(ops)
        return PlannedTensor(name, dtype, view, source_dtype, steps, rule.transposed, interleaved=rule.interleaved)

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
