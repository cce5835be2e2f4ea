"""ModelOpt's quantisation configuration: patterns of quantiser names and what they set, the last match winning.

Source: modelopt/torch/quantization/config.py and conversion.py (`set_quantizer_by_cfg`). ``quant_cfg`` is a list of
``{quantizer_name, parent_class, cfg, enable}`` in recent releases, a dict of pattern -> settings (a list of them for
several quantisers in a row, ``default`` for all) before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from msgspec import Struct

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.checkpoint.quantizer_scheme import QuantizerProperties, properties_of
from dist_export.errors import ExportError

Settings = Mapping[str, Any]
_OTHER_MODULES = ("nn.", "torch.nn.")  # classes of plain torch, of which no linear of Megatron is one
_ATTRIBUTES = {"num_bits", "axis", "block_sizes", "enable", "type", "fake_quant", "unsigned", "calibrator", "trt_high_"}
_MOST_RULES = 4096


class ConfigRule(Struct, frozen=True):
    """One entry of the configuration."""

    pattern: str
    settings: tuple[Settings, ...]
    """One per quantiser in a row; a single one is for all."""
    enable: bool | None = None
    """None: as the settings say, which are then those of an older release's dict."""

    def matches(self, name: str) -> bool:
        """Whether it is about the quantiser called `name`."""
        return fnmatchcase(name, self.pattern)


def config_rules(quant_cfg: object, *, origin: str) -> tuple[ConfigRule, ...]:
    """The entries of ``quant_cfg`` in their order, without those for other classes of modules than linears.

    Raises `ExportError`, naming `origin`, for a configuration of another form.
    """
    if isinstance(quant_cfg, Mapping):
        rules = tuple(_of_dict(quant_cfg, origin))
    elif isinstance(quant_cfg, Sequence) and not isinstance(quant_cfg, str | bytes):
        rules = tuple(_of_list(quant_cfg, origin))
    else:
        raise ExportError(f"{origin}: quant_cfg is a {type(quant_cfg).__name__}, expected a list or a dictionary")
    if len(rules) > _MOST_RULES:
        raise ExportError(f"{origin}: quant_cfg has {len(rules)} entries, at most {_MOST_RULES} are accepted")
    return rules


def apply_rules(rules: Sequence[ConfigRule], module: ModuleName, quantizer: str) -> tuple[QuantizerProperties, ...]:
    """What the configuration makes of a module's quantiser; empty when no entry is about it.

    Raises ValueError for values that no quantiser has.
    """
    names = [f"{name}.{quantizer}" for name in _names_in_model(module)]
    current: list[dict[str, Any]] = []
    for rule in rules:
        if any(rule.matches(name) for name in names):
            current = _applied(current or [{}], rule)
    return tuple(properties_of(settings) for settings in current)


def _applied(current: list[dict[str, Any]], rule: ConfigRule) -> list[dict[str, Any]]:
    """Settings replace all that a quantiser was told before; without any it is only switched on or off."""
    if not rule.settings:
        return [{**each, "enable": rule.enable} for each in current]
    enabled = {} if rule.enable is None else {"enable": rule.enable}
    told = [{**settings, **enabled} for settings in rule.settings]
    if len(told) == 1 and rule.enable is None:  # the dict of older releases leaves several quantisers several
        return told * len(current)
    return told


def _names_in_model(module: ModuleName) -> Iterator[str]:
    """What a module is called in the model: experts are modules of their own or one for all."""
    name = str(module)
    yield name
    if ".experts.experts." in name:
        yield name.replace(".experts.experts.", ".experts.local_experts.")
        head, _, tail = name.partition(".experts.experts.")
        yield f"{head}.experts.{tail.partition('.')[2] if module.expert >= 0 else tail}"


def _of_list(entries: Sequence[Any], origin: str) -> Iterator[ConfigRule]:
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("quantizer_name"), str):
            raise ExportError(f"{origin}: an entry of quant_cfg without a quantizer_name: {entry!r:.120}")
        if _is_for_linears(entry.get("parent_class"), origin):
            enable = entry.get("enable")
            yield ConfigRule(entry["quantizer_name"], _settings(entry.get("cfg"), origin), enable is not False)


def _of_dict(entries: Mapping[Any, Any], origin: str) -> Iterator[ConfigRule]:
    if "default" in entries:
        yield ConfigRule("*", _settings(entries["default"], origin))
    for pattern, value in entries.items():
        if not isinstance(pattern, str):
            raise ExportError(f"{origin}: a pattern of quant_cfg that is a {type(pattern).__name__}, expected a string")
        if pattern == "default":
            continue
        if isinstance(value, Mapping) and value and not _ATTRIBUTES & set(value):  # class -> patterns
            if _is_for_linears(pattern, origin):
                yield from _of_dict(value, origin)
        else:
            yield ConfigRule(pattern, _settings(value, origin))


def _is_for_linears(parent_class: object, origin: str) -> bool:
    if parent_class is None:
        return True
    if isinstance(parent_class, str) and parent_class.startswith(_OTHER_MODULES):
        return False
    raise ExportError(
        f"{origin}: quant_cfg has settings for modules of the class {parent_class!r:.80}; which layers are of it is "
        "not in the checkpoint"
    )


def _settings(value: object, origin: str) -> tuple[Settings, ...]:
    if value is None:
        return ()
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ExportError(f"{origin}: settings of a quantiser are {value!r:.120}, expected a dictionary")
    return tuple(parts)
