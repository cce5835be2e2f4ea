"""YAML and JSON of untrusted checkpoints as plain values: bounded, without tags, nothing instantiated."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dist_export.errors import ExportError

MOST_BYTES = 8 << 20
_MOST_DEPTH = 64
_MOST_ALIASES = 10_000
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "seq", "map", "set", "binary", "timestamp")
)


def parse_yaml(data: bytes, *, origin: str) -> dict[str, Any]:
    """A YAML mapping with the types of JSON (and dates, sets and bytes, which no caller looks at).

    Anchors and aliases, which trainers' dumps have for equal lists, become shared objects. Merge keys, which can
    multiply, tags of anything but YAML's own types and documents beyond the limits are refused with an `ExportError`
    that names `origin`.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = data.decode()
        _look_over(yaml.parse(text, Loader=loader), origin)
        value = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{origin}: not plain YAML: {reason}") from None
    return _mapping(value, origin)


def _look_over(events: Any, origin: str) -> None:
    """Check the parser's events, before anything is built from them."""
    depth = aliases = 0
    for event in events:
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        aliases += kind == "AliasEvent"
        tag = getattr(event, "tag", None)
        if depth > _MOST_DEPTH or aliases > _MOST_ALIASES:
            raise ExportError(f"{origin}: refused: more than {_MOST_DEPTH} levels or {_MOST_ALIASES} aliases")
        if kind == "ScalarEvent" and event.value == "<<" and event.implicit[0]:
            raise ExportError(f"{origin}: refused: it has merge keys, which no trainer writes")
        if tag and tag != "!" and tag not in _PLAIN_TAGS:
            raise ExportError(f"{origin}: refused: it has the tag {tag[:100]}, only plain values are read")


def parse_json(data: bytes, *, origin: str) -> dict[str, Any]:
    """A JSON object; `ExportError` for anything else."""
    try:
        return _mapping(json.loads(data), origin)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{origin}: not JSON: {str(error)[:300]}") from None


def _mapping(value: object, origin: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ExportError(f"{origin}: holds a {type(value).__name__}, expected a mapping with names")
    return dict(value)


def plain(value: object) -> object:
    """A value that a trainer wrote as a description of an object, where it stands for a word: functions, element types
    and enumeration members become their names. Numbers like ``1e-5``, which YAML 1.1 takes for text, become floats.

    The descriptions are those of megatron/training/config/yaml_utils.py (Megatron-Bridge, NeMo 2): ``_target_`` with
    ``_call_: false`` for functions and element types, ``_name_`` and ``_args_`` for enumerations, ``_partial_``.
    """
    if isinstance(value, str) and _FLOAT.fullmatch(value):
        return float(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("_target_"), str):
        return value
    if isinstance(value.get("_name_"), str):
        return value["_name_"]
    if value.get("_call_") is False:
        return value["_target_"]
    if value.get("_partial_") is True and value.get("approximate") == "tanh":
        return "gelu_tanh"
    return value
