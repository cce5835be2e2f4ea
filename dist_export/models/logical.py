"""The logical tensors of one model, found in one checkpoint through its family's source rules."""

from __future__ import annotations

from collections import defaultdict

from msgspec import Struct

from dist_export.errors import ExportError, Faults
from dist_export.models.catalog import SourceCatalog
from dist_export.models.config import ModelConfig
from dist_export.models.rules import SourceRule
from dist_export.models.source_tensor import SourceTensor
from dist_export.models.value_ops import ValueOp
from dist_export.tensors.views import View


class LogicalTensor(Struct, frozen=True):
    """A logical tensor as pieces of stored ones, with the arithmetic its values need."""

    view: View
    dtype: str
    """Element type as stored."""
    values: tuple[ValueOp, ...]


class Located(Struct, frozen=True):
    """Where a logical tensor comes from: the rule, which of its parts it is, and the stored tensor."""

    rule: SourceRule
    part: int
    source: SourceTensor


class LogicalModel:
    """Resolves logical names to views of the checkpoint. Pure: reads no file.

    The same instance serves every target rank. What was found last is kept, so that asking for query, key and
    value splits the fused tensor once, and so do the tp ranks of a pipeline stage together.
    """

    MOST_KEPT = 1 << 16
    """Tensors at a time, about 0.5 kB each: those of a pipeline stage, also of one with thousands of experts. Ranks ask
    for them in the same order, so that fewer than a stage has would be none."""

    def __init__(self, catalog: SourceCatalog, rules: tuple[SourceRule, ...], config: ModelConfig) -> None:
        self.catalog = catalog
        self.config = config
        self.rules = rules
        self._rules: dict[str, list[tuple[SourceRule, int]]] = defaultdict(list)
        for rule in rules:
            if rule.when(config):
                for part, logical in enumerate(rule.logical):
                    self._rules[logical].append((rule, part))
        stored = set(catalog.patterns())
        self._present = {
            logical: [(rule, part) for rule, part in each if rule.source in stored]
            for logical, each in self._rules.items()
        }
        self._kept: dict[tuple[str, int, int], LogicalTensor] = {}

    def find(self, name: str, *, layer: int = -1, expert: int = -1) -> LogicalTensor | None:
        """The logical tensor, or None when no rule's source is in the checkpoint.

        Raises `ExportError` as `locate`, and when a source does not have the shape its rule needs.
        """
        kept = self._kept.get((name, layer, expert))
        if kept is not None:
            return kept
        located = self.locate(name, layer=layer, expert=expert)
        return None if located is None else self._split(located, layer, expert)[located.part]

    def locate(self, name: str, *, layer: int = -1, expert: int = -1) -> Located | None:
        """The stored tensor that holds a logical one, or None when no rule's source is in the checkpoint.

        Raises `ExportError` when two rules both find a source: the checkpoint holds the same weight under two names.
        """
        found = [
            Located(rule, part, source)
            for rule, part in self._present.get(name, ())
            if (source := self.catalog.find(rule.source, layer=layer, expert=expert)) is not None
        ]
        if len(found) > 1:
            names = " and ".join(str(each.source.slab) for each in found)
            raise ExportError(f"{names} both hold {name}; keep one of them")
        return found[0] if found else None

    def sources_of(self, name: str) -> list[str]:
        """Folded source names that could hold a logical tensor: for messages."""
        return [rule.source for rule, _ in self._rules.get(name, ())]

    def _split(self, located: Located, layer: int, expert: int) -> list[LogicalTensor]:
        """All that a stored tensor holds."""
        rule, source = located.rule, located.source
        try:
            views = rule.op.split(View.of(source.slab, source.shape), self.config.of_layer(layer))
        except ExportError as error:
            raise ExportError(f"{source.slab}: {error}") from error
        if len(views) != len(rule.logical):
            names = ", ".join(rule.logical)
            raise ExportError(f"{source.slab}: its rule makes {len(views)} tensors of it, and names {names}")
        values = rule.values(self.config)
        tensors = [LogicalTensor(view, source.dtype, values) for view in views]
        for name, tensor in zip(rule.logical, tensors, strict=True):
            if len(self._present[name]) == 1:  # or else `locate` has to see which source it is
                self._keep((name, layer, expert), tensor)
        return tensors

    def _keep(self, key: tuple[str, int, int], tensor: LogicalTensor) -> None:
        while len(self._kept) >= self.MOST_KEPT:
            del self._kept[next(iter(self._kept))]  # the oldest
        self._kept[key] = tensor


def unexpected_sources(catalog: SourceCatalog, rules: tuple[SourceRule, ...], config: ModelConfig) -> Faults:
    """Source tensors that no rule of the family takes. Nothing is dropped silently."""
    taken = {rule.source for rule in rules if rule.when(config)}
    faults = Faults("the checkpoint has tensors that this model has no place for")
    for pattern in sorted(set(catalog.patterns()) - taken):
        reason = next((rule for rule in rules if rule.source == pattern), None)
        hint = " (the model's configuration excludes it)" if reason else ""
        faults.add(f"unexpected tensor {pattern}{hint}")
    return faults
