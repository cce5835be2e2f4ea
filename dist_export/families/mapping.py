"""A user's own model: a YAML file that extends or overrides a family's rule tables, in their own vocabulary.

The file is plain data. It names a family to start from, then lists source rules, and rules of either target; a rule for
a name that the family has replaces the family's. The README has an example.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from dist_export.checkpoint.plain_text import MOST_BYTES, parse_yaml
from dist_export.errors import ExportError, Faults
from dist_export.families.registry import FAMILIES, choose_family
from dist_export.models import layout_ops, megatron, shard_ops
from dist_export.models.config import ModelConfig
from dist_export.models.layout_ops import LayoutOp, TrimVocabulary
from dist_export.models.rules import Architecture, Condition, Family, Input, Scope, SourceRule, TargetRule, always
from dist_export.models.shard_ops import ShardOp, SlicePadded
from dist_export.models.value_ops import ValueOp, ValueOps, no_value_ops, plus_one_if_zero_centered
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.trtllm.architecture import EngineModel
from dist_export.targets.trtllm.releases import Keys
from dist_export.targets.trtllm.tables import EmbeddingSharding

T = TypeVar("T")

LAYOUT_OPS: Mapping[str, LayoutOp] = {
    "same": layout_ops.SAME,
    "split_qkv": layout_ops.SPLIT_QKV,
    "split_halves": layout_ops.SPLIT_HALVES,
    "trim_vocabulary": TrimVocabulary(),
}
SHARD_OPS: Mapping[str, ShardOp] = {
    "replicate": shard_ops.REPLICATE,
    "column": shard_ops.COLUMN,
    "row": shard_ops.ROW,
    "heads": shard_ops.HEADS,
    "key_value_heads": shard_ops.KEY_VALUE_HEADS,
    "vocabulary": SlicePadded(lambda config: config.vocab_size),
}
VALUE_OPS: Mapping[str, ValueOps] = {
    "none": no_value_ops,
    "add_one": lambda config: (ValueOp.ADD_ONE,),
    "subtract_one": lambda config: (ValueOp.SUBTRACT_ONE,),
    "add_one_if_zero_centered": plus_one_if_zero_centered,
}
CONDITIONS: Mapping[str, Condition] = {
    "always": always,
    "tied": megatron.tied,
    "untied": megatron.untied,
    "gated": megatron.gated,
    "not_gated": megatron.not_gated,
    "layer_norm": megatron.layer_norm,
    "learned_positions": megatron.learned_positions,
    "linear_bias": megatron.linear_bias,
    "qkv_bias": megatron.qkv_bias,
    "any_bias": megatron.any_bias,
}
SCOPES: Mapping[str, Scope] = {"first": Scope.FIRST, "layer": Scope.LAYER, "last": Scope.LAST}

_TOP = {"family", "name", "checks", "source", "trtllm", "hf"}
_SOURCE = {"source", "logical", "op", "values", "when"}
_TARGET = {"target", "inputs", "scope", "dtype", "values", "transposed", "when"}
_INPUT = {"logical", "shard", "zeros_for"}
_TABLE = {"architecture", "rules", "remove", "config"}


class ModelMapping(Struct, frozen=True):
    """A mapping file, as plain values: kept in the manifest, so that an export can be planned again without it."""

    content: Mapping[str, Any]
    origin: str

    @classmethod
    def read(cls, path: Path) -> ModelMapping:
        """Read a file; `ExportError` when it is not YAML of this kind. Rules are checked by `family`."""
        try:
            data = path.read_bytes()[: MOST_BYTES + 1]
        except OSError as error:
            raise ExportError(f"--mapping {path}: {error.strerror}") from error
        if len(data) > MOST_BYTES:
            raise ExportError(f"--mapping {path}: larger than any such file should be")
        return cls(parse_yaml(data, origin=str(path)), str(path))

    def family(self, config: ModelConfig) -> Family:
        """The family that the file describes. Raises one `ExportError` with every fault of the file."""
        reader = _Reader(Faults(f"--mapping {self.origin}"))
        family = reader.family(self.content, config)
        reader.faults.raise_if_any()
        return family


class _Reader(Struct, frozen=True):
    faults: Faults

    def family(self, content: Mapping[str, Any], config: ModelConfig) -> Family:
        self._known(content, _TOP, "the file")
        base = self._base(content, config)
        added = [rule for each in self._list(content, "source") if (rule := self._source(each))]
        taken = {rule.source for rule in added}
        rules = (*(rule for rule in base.source_rules if rule.source not in taken), *added)
        architectures = {
            name: tuple(self._architecture(each, content.get(name)) for each in each_of)
            for name, each_of in base.architectures.items()
        }
        missing = [name for name in ("trtllm", "hf") if name in content and name not in architectures]
        self.faults.extend(f"{name}: the family {base.name} has no such target to start from" for name in missing)
        name = str(content.get("name") or f"{base.name} with a mapping")
        return replace(base, name=name, source_rules=rules, architectures=architectures)

    def _base(self, content: Mapping[str, Any], config: ModelConfig) -> Family:
        name = content.get("family")
        checks = content.get("checks", True)
        if not isinstance(name, str | None) or not isinstance(checks, bool):
            raise ExportError("--mapping: family is a name and checks is true or false")
        if checks:
            return choose_family(config, name)
        found = next((family for family in FAMILIES if family.name == name), None)
        if found is None:
            raise ExportError(f"--mapping: family {name!r} is none of {', '.join(each.name for each in FAMILIES)}")
        return found

    def _architecture(self, base: Architecture, table: object) -> Architecture:
        if table is None:
            return base
        if not isinstance(table, Mapping):
            self.faults.add(f"{base.name}: expected a mapping with {', '.join(sorted(_TABLE))}")
            return base
        self._known(table, _TABLE, base.name)
        rules = [rule for each in self._list(table, "rules") if (rule := self._target(each))]
        removed = {str(name) for name in self._list(table, "remove")} | {rule.target for rule in rules}
        more = table.get("config", {})
        if not isinstance(more, Mapping):
            self.faults.add(f"{base.name}: config: expected a mapping of fields of config.json")
            more = {}
        name = str(table.get("architecture") or base.name)
        if isinstance(base, HuggingFaceModel):
            self._removes(removed - {rule.target for rule in rules}, base.rules)
            kept = (*(rule for rule in base.rules if rule.target not in removed), *rules)
            return replace(base, name=name, rules=kept, fields=_with_fields(base.fields, more))
        assert isinstance(base, EngineModel), f"{base} is of no known target"
        self._removes(removed - {rule.target for rule in rules}, base.rules(EmbeddingSharding()))

        def engine_rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
            return (*(rule for rule in base.rules(embedding) if rule.target not in removed), *rules)

        keys = Keys(base.keys.required, (*base.keys.permitted, *map(str, more)))
        return replace(base, name=name, rules=engine_rules, fields=_with_fields(base.fields, more), keys=keys)

    def _removes(self, names: set[str], rules: tuple[TargetRule, ...]) -> None:
        unknown = names - {rule.target for rule in rules}
        self.faults.extend(f"remove: {name}: the family has no such target tensor" for name in sorted(unknown))

    def _source(self, entry: object) -> SourceRule | None:
        values = self._entry(entry, _SOURCE, ("source", "logical"))
        if values is None:
            return None
        logical = values["logical"]
        names = (logical,) if isinstance(logical, str) else tuple(map(str, logical))
        where = str(values["source"])
        return SourceRule(
            where,
            names,
            op=self._one_of(LAYOUT_OPS, values, "op", "same", where),
            values=self._one_of(VALUE_OPS, values, "values", "none", where),
            when=self._one_of(CONDITIONS, values, "when", "always", where),
        )

    def _target(self, entry: object) -> TargetRule | None:
        values = self._entry(entry, _TARGET, ("target", "inputs"))
        if values is None:
            return None
        where = str(values["target"])
        inputs = tuple(part for each in self._list(values, "inputs") if (part := self._input(each, where)))
        if not inputs:
            self.faults.add(f"{where}: has no inputs")
            return None
        dtype = values.get("dtype")
        return TargetRule(
            where,
            inputs,
            self._one_of(SCOPES, values, "scope", "layer" if "{layer}" in where else "first", where),
            dtype=None if dtype is None else str(dtype),
            values=self._one_of(VALUE_OPS, values, "values", "none", where),
            transposed=values.get("transposed") is True,
            when=self._one_of(CONDITIONS, values, "when", "always", where),
        )

    def _input(self, entry: object, where: str) -> Input | None:
        if isinstance(entry, str):
            return Input(entry)
        values = self._entry(entry, _INPUT, ("logical",), where)
        if values is None:
            return None
        zeros_for = values.get("zeros_for")
        shard = self._one_of(SHARD_OPS, values, "shard", "replicate", where)
        return Input(str(values["logical"]), shard, None if zeros_for is None else str(zeros_for))

    def _entry(
        self, entry: object, known: set[str], needed: tuple[str, ...], where: str = ""
    ) -> Mapping[str, Any] | None:
        if not isinstance(entry, Mapping) or any(key not in entry for key in needed):
            self.faults.add(f"{where or 'a rule'}: {str(entry)[:100]}: expected a mapping with {', '.join(needed)}")
            return None
        self._known(entry, known, where or str(entry[needed[0]]))
        return entry

    def _known(self, values: Mapping[str, Any], known: set[str], where: str) -> None:
        unknown = sorted(set(map(str, values)) - known)
        self.faults.extend(f"{where}: unknown key {key}; known: {', '.join(sorted(known))}" for key in unknown)

    def _list(self, values: Mapping[str, Any], key: str) -> Iterator[Any]:
        found = values.get(key) or []
        if not isinstance(found, list):
            self.faults.add(f"{key}: expected a list")
            return
        yield from found

    def _one_of(self, table: Mapping[str, T], values: Mapping[str, Any], key: str, default: str, where: str) -> T:
        name = str(values.get(key, default))
        if name not in table:
            self.faults.add(f"{where}: {key} {name} is none of {', '.join(table)}")
            name = default
        return table[name]


def _with_fields(
    fields: Callable[[ModelConfig], dict[str, object]], more: Mapping[str, object]
) -> Callable[[ModelConfig], dict[str, object]]:
    return lambda config: {**fields(config), **more}


class CodeMapping(Struct, frozen=True):
    """A Python file whose ``make_family(config)`` returns a `Family`. It runs with all rights of the user."""

    path: Path

    def family(self, config: ModelConfig) -> Family:
        """What the file returns; `ExportError` when it is no family."""
        if not self.path.is_file():
            raise ExportError(f"--mapping {self.path}: no such file")
        make = runpy.run_path(str(self.path)).get("make_family")
        if not callable(make):
            raise ExportError(f"--mapping {self.path}: it defines no function make_family(config)")
        made = make(config)
        if not isinstance(made, Family):
            raise ExportError(f"--mapping {self.path}: make_family returned a {type(made).__name__}, expected a Family")
        return made


def mapping_from(path: Path, *, code_allowed: bool) -> ModelMapping | CodeMapping:
    """The mapping in a file. Python runs only where that is allowed; `ExportError` otherwise."""
    if path.suffix != ".py":
        return ModelMapping.read(path)
    if not code_allowed:
        raise ExportError(f"--mapping {path}: is a program; give --allow-mapping-code to run it, or write it as YAML")
    return CodeMapping(path.absolute())
