"""What ModelOpt did to a checkpoint's model: modes, and per module what every quantiser is.

The modes are in ``modelopt_state/common.pt`` beside the records, a checkpoint of its own (from Megatron-Core 0.19 on
its common state may be a record), or under ``modelopt_state`` in every legacy rank file. What a module's quantisers are
is in its ``_extra_state`` from ModelOpt 0.29 on, before in records of the ``modelopt_state`` folder, in legacy files
always in the mode's metadata too. The configuration says the rest (the head's state is never saved): its patterns are
older than what was disabled later.
Source: modelopt/torch/opt/plugins/mcore_dist_checkpointing.py, modelopt/torch/quantization/plugins/megatron.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct, field

from dist_export.checkpoint.extra_state import ExtraState
from dist_export.checkpoint.extra_state_records import StateRecord, read_states
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.modelopt_files import MODELOPT_KEY, SavedModelopt, read_modelopt_files
from dist_export.checkpoint.modelopt_rules import ConfigRule, apply_rules, config_rules
from dist_export.checkpoint.quantizer_names import ModuleName, module_name
from dist_export.checkpoint.quantizer_scheme import (
    KvScheme,
    LinearScheme,
    QuantizerProperties,
    Scheme,
    described,
    kv_scheme,
    linear_scheme,
    overall,
    properties_of,
)
from dist_export.errors import ExportError, Faults

Quantizers = Mapping[str, tuple[QuantizerProperties, ...]]
"""Name in the module -> its properties; several that follow each other (``weight_quantizer.0``, ``.1``) in a row."""

_WEIGHT, _INPUT = "weight_quantizer", "input_quantizer"
_QUANTIZE = ("quantize", "auto_quantize")
_COMPRESSED = ("real_quantize", "compress")
_KV = ("k_bmm_quantizer", "v_bmm_quantizer")
_PACKED_WEIGHT = "modelopt_q_tensor_state"  # empty for a linear that could be compressed and is not


class ModeloptModule(Struct, frozen=True):
    """A module's own state."""

    quantizers: Quantizers
    compressed: bool
    """Whether its weight is stored quantised."""


_NO_LINEAR = re.compile(r"(embeddings?|norm)$")
_UNQUANTISED = ModeloptModule({}, compressed=False)


class ModeloptScheme(Struct, frozen=True):
    """How ModelOpt quantised a model."""

    version: str
    """Of ModelOpt; empty where only modules tell."""
    modes: tuple[tuple[str, str], ...]
    """(mode, method): ("quantize", "awq_lite"), ("awq_lite_calibrate", "awq_lite"), …"""
    rules: tuple[ConfigRule, ...] = ()
    modules: Mapping[ModuleName, ModeloptModule] = field(default_factory=dict)
    origin: str = ""

    @property
    def is_compressed(self) -> bool:
        """Whether weights were turned into their quantised form (``mtq.compress``)."""
        return any(mode in _COMPRESSED for mode, _ in self.modes) or any(m.compressed for m in self.modules.values())

    @property
    def algorithm(self) -> str:
        """How scales were found: max, awq_lite, awq_clip, smoothquant, mse, …"""
        return next((method for mode, method in self.modes if mode in _QUANTIZE), "")

    def module(self, name: ModuleName) -> ModeloptModule | None:
        """A module's own state, or that of all experts of its layer; None where only the configuration tells."""
        return self.modules.get(name) or self.modules.get(ModuleName(name.pattern, name.layer))

    def quantizers(self, name: ModuleName) -> Quantizers:
        """What the quantisers of a linear are: its own state, or else what the configuration says of its name.

        Raises `ExportError` for settings that no quantiser has.
        """
        own = self.module(name)
        if own is not None:
            return own.quantizers
        if _NO_LINEAR.search(name.pattern):
            return {}
        try:
            return {each: apply_rules(self.rules, name, each) for each in (_WEIGHT, _INPUT)}
        except ValueError as error:
            raise described(error, name) from None

    def linear(self, name: ModuleName) -> LinearScheme:
        """How a linear is quantised. Raises `ExportError` where that has no name."""
        own = self.module(name)
        try:
            return linear_scheme(self.quantizers(name), compressed=own is not None and own.compressed)
        except ValueError as error:
            raise described(error, name) from None

    def linears(self, names: Iterable[ModuleName]) -> dict[ModuleName, LinearScheme]:
        """The same of many; `ExportError` naming all that have no name."""
        faults, found = Faults(f"{self.origin}: quantisation of linears"), {}
        for name in names:
            try:
                found[name] = self.linear(name)
            except ExportError as error:
                faults.add(str(error))
        faults.raise_if_any()
        return found

    def overall(self, names: Iterable[ModuleName]) -> Scheme:
        """The scheme of these linears together, `Scheme.MIXED` where they differ."""
        return overall(self.linears(names).values())

    def kv_cache(self, attention: ModuleName, qkv: ModuleName) -> KvScheme:
        """How a layer's keys and values are quantised: by quantisers of `attention` (``…core_attention``), by old
        releases by that of the output of `qkv` (``…linear_qkv``). Raises `ExportError` where that has no name."""
        found: list[QuantizerProperties] = []
        try:
            for name, quantizers in ((attention, _KV), (qkv, ("output_quantizer",))):
                own = self.module(name)
                for each in quantizers:
                    found += own.quantizers.get(each, ()) if own else apply_rules(self.rules, name, each)
            return kv_scheme(found)
        except ValueError as error:
            raise described(error, attention) from None


def read_modelopt_scheme(index: CheckpointIndex) -> ModeloptScheme | None:
    """How the checkpoint was quantised by ModelOpt, None when it was not. Reads small files and layer states.

    Raises `ExportError` for states that cannot be read or are of a form that no release writes.
    """
    saved = read_modelopt_files(index)
    return modelopt_scheme_of(saved, read_states(index), origin=str(index.folder))


def modelopt_scheme_of(
    saved: SavedModelopt | None, states: Iterable[tuple[StateRecord, ExtraState]], *, origin: str
) -> ModeloptScheme | None:
    """As `read_modelopt_scheme`, of what was read: `states` may have been read for TransformerEngine too."""
    faults = Faults(f"{origin}: ModelOpt's state of modules")
    modules: dict[ModuleName, ModeloptModule] = dict(_from_files(saved, faults) if saved else ())
    plain = []
    for record, state in states:
        if state.modelopt is None:
            plain.append(record.module)
            continue
        try:
            modules[record.module] = _module(state.modelopt, record.module)
        except (ValueError, ExportError) as error:
            faults.add(f"{record.name}: {error}")
    faults.raise_if_any()
    if modules:  # through ModelOpt 0.40 a module with a disabled quantiser keeps no state
        modules = dict.fromkeys(plain, _UNQUANTISED) | modules
    if saved is None:
        return ModeloptScheme("", (), modules=modules, origin=origin) if modules else None
    return ModeloptScheme(saved.version, tuple(_modes(saved)), tuple(_rules(saved)), modules, saved.origin)


def _modes(saved: SavedModelopt) -> Iterator[tuple[str, str]]:
    for mode, state in saved.modes:
        config = state.get("config")
        config = config if isinstance(config, Mapping) else {}
        algorithm = config.get("algorithm", config.get("method"))
        if isinstance(algorithm, list | tuple):
            algorithm = algorithm[-1] if algorithm else None
        if isinstance(algorithm, Mapping):
            algorithm = algorithm.get("method")
        yield mode, algorithm if isinstance(algorithm, str) else ""


def _rules(saved: SavedModelopt) -> Iterator[ConfigRule]:
    for mode, state in saved.modes:
        config = state.get("config")
        if mode in _QUANTIZE and isinstance(config, Mapping) and "quant_cfg" in config:
            yield from config_rules(config["quant_cfg"], origin=saved.origin)


def _from_files(saved: SavedModelopt, faults: Faults) -> Iterator[tuple[ModuleName, ModeloptModule]]:
    """Quantisers by their full names, put together by module."""
    by_module: dict[ModuleName, dict[str, Any]] = {}
    for name, properties in saved.quantizers.items():
        head, _, tail = name.rpartition(".")
        if tail.isdigit():
            head, _, before = head.rpartition(".")
            tail = f"{before}.{tail}"
        if isinstance(properties, Mapping) and "is_sequential_quantizer" not in properties:
            by_module.setdefault(module_name(head), {})[tail] = properties
    for module, quantizers in by_module.items():
        try:
            yield module, _module({MODELOPT_KEY: quantizers}, module)
        except (ValueError, ExportError) as error:
            faults.add(f"{saved.origin}: {module}: {error}")


def _module(state: Mapping[str, Any], name: ModuleName) -> ModeloptModule:
    quantizers = state[MODELOPT_KEY]
    if not isinstance(quantizers, Mapping):
        raise ValueError(f"{MODELOPT_KEY} is a {type(quantizers).__name__}, expected a dictionary")
    rows: dict[str, dict[int, QuantizerProperties]] = {}
    for key, properties in quantizers.items():
        if not isinstance(key, str) or not isinstance(properties, Mapping):
            raise ValueError(f"its quantiser {key!r:.80} has no dictionary of properties")
        head, _, number = key.rpartition(".")
        place = (head, int(number)) if head and number.isdigit() and len(number) < 7 else (key, 0)
        rows.setdefault(place[0], {})[place[1]] = properties_of(properties)
    found = {key: _in_a_row(key, row, name) for key, row in rows.items()}
    return ModeloptModule(found, compressed=bool(state.get(_PACKED_WEIGHT)))


def _in_a_row(key: str, row: dict[int, QuantizerProperties], name: ModuleName) -> tuple[QuantizerProperties, ...]:
    """Quantisers that follow each other, or, of a grouped linear, one of each expert: those must be alike."""
    ordered = tuple(row[number] for number in sorted(row))
    if "{expert}" not in name.pattern or len(ordered) == 1 or len({each.num_bits for each in ordered}) > 1:
        return ordered
    if len(set(ordered)) > 1:
        raise ValueError(f"the experts' {key} differ from each other")
    return ordered[:1]
