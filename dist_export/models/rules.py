"""The vocabulary of rule tables.

A model passes through *logical tensors*: the plain parts of a transformer (query, key, value, gate,
up …), named once, unsharded, ``[out, in]``. Source rules say how Megatron tensors split into logical
tensors; target rules say how a target tensor is put together from shards of logical tensors. With L
families and T targets that is L + T tables instead of L x T, and each rule has its inverse through its
operations.

Names have holes: ``{layer}`` is the global layer number in source and logical names and the number
within the pipeline stage in TensorRT-LLM names. ``{expert}`` is the global expert number; target
names without that hole hold all experts of a rank (see `TargetRule`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Protocol

from msgspec import Struct, field

from dist_export.models.config import ModelConfig
from dist_export.models.features import Feature
from dist_export.models.layout_ops import SAME, LayoutOp
from dist_export.models.shard_ops import REPLICATE, ShardOp
from dist_export.models.value_ops import ValueOps, no_value_ops

Condition = Callable[[ModelConfig], bool]


LayerCondition = Callable[[ModelConfig, int], bool]
"""Of a layer, by its global number."""


def always(config: ModelConfig) -> bool:
    """The rule holds for every model of the family."""
    return True


def never(config: ModelConfig) -> bool:
    """No model of the family has it."""
    return False


def every_layer(config: ModelConfig, layer: int) -> bool:
    """All layers have the tensor."""
    return True


class SourceRule(Struct, frozen=True):
    """One Megatron tensor -> logical tensors."""

    source: str
    """Folded source name, e.g. ``decoder.layers.{layer}.mlp.linear_fc1.weight``."""
    logical: tuple[str, ...]
    """Names of the parts, in the order `op` gives them."""
    op: LayoutOp = SAME
    values: ValueOps = no_value_ops
    """Arithmetic from the stored to the logical values."""
    when: Condition = always


class Scope(Enum):
    """Which pipeline stages hold a target tensor, and how often."""

    FIRST = "first stage"
    LAYER = "once per layer"
    LAST = "last stage"
    MTP = "last stage, once per layer that predicts further tokens"
    """``{layer}`` counts on from the last decoder layer in target names, and from 0 in logical names."""


class Input(Struct, frozen=True):
    """A logical tensor and the part of it that one rank's target tensor takes."""

    logical: str
    shard: ShardOp = REPLICATE
    zeros_for: str | None = None
    """When the checkpoint has no such tensor: zeros with as many rows as this logical weight."""


class TargetRule(Struct, frozen=True):
    """One target tensor <- logical tensors, joined along dim 0 in order.

    Where only the logical names have an ``{expert}`` hole (all of them or none), that is done for every expert of the
    rank (`TargetLayout.experts`) at its position on the experts' tp axis, and the results are stacked in order of
    experts along a new leading dim: ``[experts of the rank, out, in]``.
    """

    target: str
    inputs: tuple[Input, ...]
    scope: Scope = Scope.LAYER
    dtype: str | None = None
    """A fixed element type (``float32`` routers); None means that of the export."""
    values: ValueOps = no_value_ops
    """Arithmetic from the logical to the target's values."""
    transposed: bool = False
    """Stored ``[in, out]``, after joining: the Conv1D of transformers' GPT-2. Stacked experts each by itself."""
    interleaved: bool = False
    """Of stacked experts: rows of the first and of the second half alternate in each, before a transposition."""
    absorbed: bool = False
    """Not joined: the inputs are queries and keys of latent attention, and what is stored are the queries that need no
    keys (`dist_export.plan.recipes.Absorbed`). No inverse leads back from them."""
    when: Condition = always
    layers: LayerCondition = every_layer
    """Which layers have it, of those that `scope` names; for layers that are not all alike."""

    @property
    def over_experts(self) -> bool:
        """Whether the tensor is stacked over the experts of the rank."""
        return "{expert}" in self.inputs[0].logical and "{expert}" not in self.target


class Architecture(Protocol):
    """A model class of a target. What else describes it is the target's business."""

    @property
    def name(self) -> str:
        """As config.json has it."""
        ...


class Family(Struct, frozen=True):
    """A model family: what makes a model one of it, and how its tensors map."""

    name: str
    description: str
    unmet: Callable[[ModelConfig], list[str]]
    """Why a configuration is not of this family; an empty list means it is."""
    source_rules: tuple[SourceRule, ...]
    architectures: Mapping[str, tuple[Architecture, ...]]
    """Target name -> what serves the family there: the target's own description of a model class. Several where a
    class changed between releases; a target that is missing cannot serve the family."""
    unserved: Mapping[str, str] = field(default_factory=dict)
    """Target name -> why it cannot serve the family, where that is known."""
    features: frozenset[Feature] = frozenset()
    """The uncommon things that its rules express."""
    witnesses: Mapping[str, str] = field(default_factory=dict)
    """Target name -> who, apart from this project, gave the bytes that tests compare exports of the family with."""
    implied: Condition = always
    """Which of the models that meet its conditions are of it without its being named; others it must be named for."""
