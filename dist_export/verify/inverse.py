"""The inverse rules: every Megatron tensor as pieces of target tensors.

Target tensors of all tp ranks -> their inputs -> `shard.restore` -> logical tensors -> `op.join` -> the source
tensor. The rules are walked from the source: which layer lies in which stage, and under which name, is worked out
here and not taken from the plan, so a plan that puts a tensor elsewhere does not prove itself.

Where several target tensors hold the same elements (norms on every tp rank, repeated key/value heads, an embedding
tied to the head) a source tensor can be rebuilt in several ways; together they use every copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from msgspec import Struct
from msgspec.structs import replace

from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig
from dist_export.models.layout_ops import TrimVocabulary
from dist_export.models.rules import Input, Scope, SourceRule, TargetRule
from dist_export.models.shard_ops import ShardOp, TensorParallel
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.work import OutputTensor, SlabUses, Use, flat_rectangle
from dist_export.tensors.boxes import Box, Shape
from dist_export.tensors.dtypes import dtype_by_name
from dist_export.tensors.views import Piece, Slab, View
from dist_export.verify.output import PlannedOutput

PADDING = "padding rows of the vocabulary"


class Place(Struct, frozen=True):
    """Global numbers of a layer and of an expert in it, -1 where there is none."""

    layer: int = -1
    expert: int = -1

    def fill(self, name: str) -> str:
        """A name with its holes filled."""
        return name.replace("{layer}", str(self.layer)).replace("{expert}", str(self.expert))

    def __str__(self) -> str:
        layer = f"layer {self.layer}" if self.layer >= 0 else ""
        return f"{layer}, expert {self.expert}" if self.expert >= 0 else layer


class SourceOrigin(Struct, frozen=True):
    """One Megatron tensor, or one layer or expert of it, and the rule that takes it apart."""

    rule: SourceRule
    place: Place
    tensor: SourceTensor

    def __str__(self) -> str:
        return f"{self.tensor.slab}" + (f" ({self.place})" if self.place.layer >= 0 else "")


class RebuiltSource(Struct, frozen=True):
    """A source slab with every place in the output that its elements must be found in."""

    origin: SourceOrigin
    work: SlabUses
    left_out: int
    """Elements that come back from nowhere."""

    @property
    def num_bytes(self) -> int:
        """Source bytes to compare, once per copy."""
        return sum(use.num_bytes for use in self.work.uses)


class InverseRules:
    """Rebuilds sources of one plan. Pure: reads no file."""

    def __init__(self, output: PlannedOutput) -> None:
        self.output = output
        planner = output.plan.planner
        self.logical, self.layout = planner.logical, planner.layout
        self.config, self.catalog = planner.logical.config, planner.logical.catalog
        self._consumers: dict[str, list[tuple[TargetRule, int]]] = defaultdict(list)
        for rule in planner.rules:
            if rule.when(self.config) and not rule.absorbed:
                for number, part in enumerate(rule.inputs):
                    self._consumers[part.logical].append((rule, number))

    def origins(self) -> Iterator[SourceOrigin]:
        """Every source slab that a rule of the family takes. Of rules that take one apart in different ways, as
        different targets need it, those that this target uses."""
        rules = [rule for rule in self.output.plan.family.source_rules if rule.when(self.config)]
        used = {rule.source for rule in rules if self._is_used(rule)}
        for rule in rules:
            if rule.source in used and not self._is_used(rule):
                continue
            num_layers = self.config.num_mtp_layers if rule.source.startswith("mtp.") else self.config.num_layers
            layers = range(num_layers) if "{layer}" in rule.source else (-1,)
            experts = range(self.config.num_experts) if "{expert}" in rule.source else (-1,)
            for place in (Place(layer, expert) for layer in layers for expert in experts):
                tensor = self.catalog.find(rule.source, layer=place.layer, expert=place.expert)
                if tensor is not None:
                    yield SourceOrigin(rule, place, tensor)

    def _config_at(self, place: Place) -> ModelConfig:
        """The model's configuration with the sizes of a layer."""
        return self.config.of_layer(place.layer)

    def _is_used(self, rule: SourceRule) -> bool:
        return any(name in self._consumers for name in rule.logical)

    def rebuild(self, origin: SourceOrigin) -> RebuiltSource:
        """The source of `origin` as uses of the output; `ExportError` when some part of it is nowhere."""
        views = self._rebuilt_views(origin)
        shape, uses = origin.tensor.shape, list[Use]()
        for view in views:
            if view.shape != shape:
                raise ExportError(f"{origin}: comes back with shape {list(view.shape)}, expected {list(shape)}")
            for piece in view.pieces:
                if piece.slab is not None and piece.box.num_elements:
                    uses.append(self._use(piece, piece.slab, shape))
        left_out = sum(p.box.num_elements for p in views[0].pieces if p.slab is None)
        if left_out and not isinstance(origin.rule.op, TrimVocabulary):
            raise ExportError(f"{origin}: {left_out} of its elements are nowhere in the output")
        dtype = dtype_by_name(origin.tensor.dtype, where=origin.tensor.slab.name)
        update = self.catalog.updates.get(origin.tensor.slab)
        work = SlabUses(origin.tensor.slab, shape, dtype, tuple(_without_repeats(uses)), update)
        return RebuiltSource(origin, work, left_out)

    def _use(self, piece: Piece, slab: Slab, shape: Shape) -> Use:
        output, prefix = self.output.of_slab(slab)
        inside = output.planned.view.shape
        size = (*(1 for _ in prefix), *piece.box.size[len(piece.box.size) - len(piece.source_start) :])
        row, _, column, _ = flat_rectangle(Box((*prefix, *piece.source_start), size), inside)
        return Use(flat_rectangle(piece.box, shape), output, row, column)

    def _rebuilt_views(self, origin: SourceOrigin) -> list[View]:
        """The source tensor in as many ways as it takes to use every copy of every part."""
        rule, config = origin.rule, self._config_at(origin.place)
        split = rule.op.split(View.of(origin.tensor.slab, origin.tensor.shape), config)
        copies: dict[View, list[View]] = defaultdict(list)  # parts with equal contents stand in for one another
        for part, name in zip(split, rule.logical, strict=True):
            copies[part] += self._restored(name, origin.place, part.shape)
        for part, name in zip(split, rule.logical, strict=True):
            if not copies[part]:
                raise ExportError(f"{origin}: its part {name} is in no target tensor")
        rounds = max(len(views) for views in copies.values())
        return [
            rule.op.join([copies[part][k % len(copies[part])] for part in split], config) for k in range(rounds)
        ]

    def _restored(self, logical: str, place: Place, shape: Shape) -> list[View]:
        """A logical tensor of `shape` from the target tensors that hold it, once per copy."""
        views: list[View] = []
        for rule, number in self._consumers[logical]:
            shard = rule.inputs[number].shard
            for stage, at in product(self._stages(rule, place.layer), self._holding(rule, place)):
                holders = self._holders(rule, stage, at.expert)
                shards = [self._input_view(rule, number, at, rank) for rank, _ in holders]
                config = self._config_at(at)
                chosen = self._copies(shard, shards, [tp for _, tp in holders], shape, config)
                views += [shard.restore(each, config) for each in chosen]
        return views

    def _holding(self, rule: TargetRule, place: Place) -> list[Place]:
        """Where a rule holds a logical tensor of `place`: layers with copies of the embedding hold it several times."""
        if rule.scope is Scope.MTP and place.layer < 0:
            return [Place(layer, place.expert) for layer in range(self.config.num_mtp_layers)]
        return [place]

    def _holders(self, rule: TargetRule, stage: int, expert: int) -> list[tuple[int, TensorParallel]]:
        """The target ranks of a stage that hold a rule's tensor (of an expert), in order of their tp positions."""
        ranks = range(stage * self.layout.tp_size, (stage + 1) * self.layout.tp_size)
        if not rule.over_experts:
            return [(rank, self.layout.tensor_parallel(rank)) for rank in ranks]
        held = [rank for rank in ranks if expert in self.layout.experts(rank, self.config.num_experts)]
        positions = [(rank, self.layout.expert_tensor_parallel(rank)) for rank in held]
        return sorted(positions, key=lambda each: each[1].rank)

    def _copies(
        self,
        shard: ShardOp,
        shards: Sequence[View],
        positions: Sequence[TensorParallel],
        shape: Shape,
        config: ModelConfig,
    ) -> Iterator[list[View]]:
        """Shards of all tp ranks, with each copy in turn where ranks hold the same part."""
        whole = View.of(Slab("logical"), shape)
        held = [shard.take(whole, tp, config) for tp in positions]
        holders: dict[View, list[View]] = defaultdict(list)
        for part, view in zip(held, shards, strict=True):
            holders[part].append(view)
        for k in range(max(map(len, holders.values()), default=0)):
            yield [holders[part][k % len(holders[part])] for part in held]

    def _stages(self, rule: TargetRule, layer: int) -> list[int]:
        """The pipeline stages that hold a rule's tensor."""
        if rule.scope is Scope.FIRST:
            return [0]
        if rule.scope in (Scope.LAST, Scope.MTP):
            return [self.layout.pp_size - 1]
        return [s for s in range(self.layout.pp_size) if layer in self.layout.layers(s * self.layout.tp_size)]

    def target_name(self, rule: TargetRule, place: Place, rank: int) -> str:
        """What `rank` calls the tensor of a rule: layers are numbered from 0 in every stage."""
        if rule.scope is Scope.MTP:
            return Place(self.config.num_layers + place.layer, place.expert).fill(rule.target)
        return Place(place.layer - self.layout.layers(rank).start, place.expert).fill(rule.target)

    def _input_view(self, rule: TargetRule, number: int, place: Place, rank: int) -> View:
        """The rows of a rank's target tensor that one input of its rule fills."""
        name = self.target_name(rule, place, rank)
        output = self.output.find(rank, name)
        if output is None:
            raise ExportError(f"target rank {rank} has no tensor {name}")
        prefix: Shape = ()
        tp = self.layout.tensor_parallel(rank)
        if rule.over_experts:
            experts = self.layout.experts(rank, self.config.num_experts)
            prefix, tp = (experts.index(place.expert),), self.layout.expert_tensor_parallel(rank)
        whole = [View.zeros(self.logical_shape(part, place)) for part in rule.inputs]
        config = self._config_at(place)
        shards = [part.shard.take(view, tp, config) for part, view in zip(rule.inputs, whole, strict=True)]
        rows = [view.shape[0] for view in shards]
        return self.output.view(output, *prefix).narrow(0, sum(rows[:number]), rows[number])

    def logical_shape(self, part: Input, place: Place) -> Shape:
        """The whole shape of an input; that of the zeros which stand in for it where the source has none."""
        tensor = self.logical.find(part.logical, layer=place.layer, expert=place.expert)
        if tensor is not None:
            return tensor.view.shape
        like = (
            self.logical.find(part.zeros_for, layer=place.layer, expert=place.expert) if part.zeros_for else None
        )
        if like is None:
            raise ExportError(f"the checkpoint has no {place.fill(part.logical)}")
        return like.view.shape[:1]

    def rule_of(self, output: OutputTensor) -> tuple[TargetRule, Place, int] | None:
        """(rule, place, target rank) that make a target tensor; None when no rule does."""
        for rank in range(self.layout.world_size):
            if self.output.find(rank, output.planned.name) is not output:
                continue
            stage = self.layout.pp_rank(rank)
            for rule in self.output.plan.planner.rules:
                if not rule.when(self.config):
                    continue
                for place in self._places(rule, rank):
                    holds = stage in self._stages(rule, place.layer)
                    if holds and self.target_name(rule, place, rank) == output.planned.name:
                        return rule, place, rank
        return None

    def _places(self, rule: TargetRule, rank: int) -> Iterator[Place]:
        layers: Iterable[int] = (-1,)
        if rule.scope is Scope.LAYER:
            layers = (layer for layer in self.layout.layers(rank) if rule.layers(self.config, layer))
        elif rule.scope is Scope.MTP:
            layers = range(self.config.num_mtp_layers)
        experts = range(self.config.num_experts) if "{expert}" in rule.target else (-1,)
        return (Place(layer, expert) for layer in layers for expert in experts)

    def logical_position(self, origin: SourceOrigin, row: int, column: int) -> str:
        """An element of a source tensor in terms of the model: ``layers.3.attention.key.weight[17, 5]``."""
        shape = origin.tensor.shape
        position = (row, column)[-len(shape) :] if shape else ()
        split = origin.rule.op.split(View.of(origin.tensor.slab, shape), self._config_at(origin.place))
        for part, name in zip(split, origin.rule.logical, strict=True):
            for piece in part.pieces:
                inner = [p - s for p, s in zip(position, piece.source_start, strict=True)]
                if all(0 <= i < n for i, n in zip(inner, piece.box.size, strict=True)):
                    index = [i + s for i, s in zip(inner, piece.box.start, strict=True)]
                    return f"{origin.place.fill(name)}{index}"
        return f"{origin.tensor.slab}{list(position)}"


def _without_repeats(uses: Iterable[Use]) -> list[Use]:
    """The same comparisons, each once: the ways to rebuild a source share what has no copies.

    Neighbouring pieces may be joined in one way and apart in another, so equal places are told by where they lie in
    the output relative to the source, and joined along rows and then (for one-dimensional tensors) along columns.
    """
    return _joined(_joined(uses, 0), 2)


def _joined(uses: Iterable[Use], first: int) -> list[Use]:
    """Uses that differ in two edges of their source alone (`first` and the next) and touch or overlap, made one."""
    same: dict[tuple[object, ...], list[Use]] = defaultdict(list)
    for use in uses:
        shift = (use.row - use.source[0], use.column - use.source[2])
        other = use.source[2:] if first == 0 else use.source[:2]
        same[use.output.file, use.output.index, shift, other].append(use)
    result: list[Use] = []
    for group in same.values():
        group.sort(key=lambda use: use.source[first : first + 2])
        result.append(group[0])
        for use in group[1:]:
            end = result[-1].source[first + 1]
            if use.source[first] > end:
                result.append(use)
                continue
            edges = list(result[-1].source)
            edges[first + 1] = max(end, use.source[first + 1])
            top, bottom, left, right = edges
            result[-1] = replace(result[-1], source=(top, bottom, left, right))
    return result
