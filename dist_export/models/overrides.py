"""Configuration values given by the user: `--set field=value`, and files with `field: value`.

Values are typed from `ModelConfig` itself, so a new field is overridable the moment it exists.
"""

from __future__ import annotations

import functools
import json
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType

from dist_export.errors import ExportError, Faults
from dist_export.models.blocks import Block, Blocks
from dist_export.models.config import CHOICES, ModelConfig, RopeScaling

COMMAND_LINE = "command line"
FIELDS: tuple[str, ...] = ModelConfig.__struct_fields__
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_NONE = frozenset({"none", "null", ""})


def parse_override(field: str, text: str) -> object:
    """The value of `ModelConfig` field `field` written as `text` on a command line.

    Booleans are true/false, optional fields take "none", lists are "1,0,1", and `rope_scaling` is
    "linear:FACTOR", "llama3:FACTOR[:LOW:HIGH:ORIGINAL_LENGTH]" or "yarn:FACTOR:ORIGINAL_LENGTH[:MSCALE:ALL_DIM]".

    Raises:
        ExportError: no such field (with the nearest names), or text that is not of the field's type.
    """
    check_field(field)
    kind, optional = _field_type(field)
    text = text.strip()
    if optional and text.lower() in _NONE:
        return None
    value = _PARSERS[kind](field, text)
    return _check_choice(field, value)


def coerce_override(field: str, value: object) -> object:
    """`value` as field `field` wants it; `value` is what YAML or JSON gave, or already of the right type.

    Raises:
        ExportError: no such field, or a value that cannot be one of the field's type.
    """
    check_field(field)
    if isinstance(value, str):
        return parse_override(field, value)
    kind, optional = _field_type(field)
    if value is None and optional:
        return None
    return _check_choice(field, _COERCERS[kind](field, value))


def overrides_from_file(path: str | Path) -> dict[str, tuple[object, str]]:
    """Overrides in a YAML or JSON mapping of field to value: field -> (value, "file PATH").

    Raises:
        ExportError: the file cannot be read or parsed, is no mapping, or has unknown fields or values of
            the wrong type; all of them in one message.
    """
    content = _load_mapping(Path(path))
    faults = Faults(f"configuration file {path}")
    overrides: dict[str, tuple[object, str]] = {}
    for field, value in content.items():
        try:
            overrides[str(field)] = (coerce_override(str(field), value), f"file {path}")
        except ExportError as error:
            faults.add(str(error))
    faults.raise_if_any()
    return overrides


def check_field(field: str) -> None:
    """Raise `ExportError` with the nearest names unless `ModelConfig` has a field called `field`."""
    if field in FIELDS:
        return
    import difflib

    near = difflib.get_close_matches(field, FIELDS, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ExportError(f"there is no model configuration field {field!r}{hint} (known fields: {', '.join(FIELDS)})")


def _load_mapping(path: Path) -> Mapping[object, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"configuration file {path} cannot be read: {error}") from None
    content = _parse_json(path, text) if path.suffix.lower() == ".json" else _parse_yaml(path, text)
    if not isinstance(content, Mapping):
        raise ExportError(f"configuration file {path} holds a {type(content).__name__}, expected 'field: value' lines")
    return content


def _parse_json(path: Path, text: str) -> object:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ExportError(f"configuration file {path} is not valid JSON: {error}") from None


def _parse_yaml(path: Path, text: str) -> object:
    import yaml  # here, because most runs have no such file and start-up time counts

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ExportError(f"configuration file {path} is not valid YAML: {error}") from None


@functools.cache
def _field_types() -> dict[str, object]:
    return typing.get_type_hints(ModelConfig)


def _field_type(field: str) -> tuple[object, bool]:
    """The key into the parser tables for a field, and whether it may be None."""
    hint = _field_types()[field]
    optional = typing.get_origin(hint) is UnionType
    if optional:
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not NoneType)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return str, optional
    return origin or hint, optional


def _check_choice(field: str, value: object) -> object:
    choices = CHOICES.get(field)
    if choices and value not in choices:
        raise ExportError(f"{field} is {value!r}, must be one of {', '.join(choices)}")
    return value


def _wrong(field: str, value: object, expected: str) -> ExportError:
    return ExportError(f"{field}: {value!r} is not {expected}")


def _parse_int(field: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _wrong(field, text, "an integer") from None


def _parse_float(field: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _wrong(field, text, "a number") from None


def _parse_bool(field: str, text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise _wrong(field, text, "true or false")


def _parse_str(field: str, text: str) -> str:
    return text


def _parse_integers(field: str, text: str) -> tuple[int, ...]:
    items = text.strip("[]() ").split(",")
    return tuple(_parse_int(field, item.strip()) for item in items if item.strip())


def _parse_rope_scaling(field: str, text: str) -> RopeScaling:
    kind, *numbers = text.split(":")
    counts = {"linear": (1,), "llama3": (1, 4), "yarn": (2, 4)}
    if kind not in counts or len(numbers) not in counts[kind]:
        forms = ("linear:FACTOR", "llama3:FACTOR[:LOW:HIGH:ORIGINAL_LENGTH]")
        raise _wrong(field, text, f"{', '.join(forms)}, yarn:FACTOR:ORIGINAL_LENGTH[:MSCALE:ALL_DIM] or none")
    length = "original_max_position_embeddings"
    names: tuple[str, ...] = ("factor", "low_freq_factor", "high_freq_factor", length)
    if kind == "yarn":
        names = ("factor", length, "mscale", "mscale_all_dim")
    values: dict[str, typing.Any] = {
        name: (_parse_int if name == length else _parse_float)(field, number)
        for name, number in zip(names, numbers, strict=False)
    }
    return RopeScaling(kind=typing.cast(typing.Any, kind), **values)


def _coerce_int(field: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # a library's own kind of int has no place in a manifest
    raise _wrong(field, value, "an integer")


def _coerce_float(field: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise _wrong(field, value, "a number")


def _coerce_bool(field: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _wrong(field, value, "true or false")


def _coerce_str(field: str, value: object) -> str:
    raise _wrong(field, value, "a word")


def _coerce_integers(field: str, value: object) -> tuple[int, ...]:
    if isinstance(value, list | tuple):
        return tuple(_coerce_int(field, item) for item in value)
    raise _wrong(field, value, "a list of integers")


def _coerce_rope_scaling(field: str, value: object) -> RopeScaling:
    if isinstance(value, RopeScaling):
        return value
    known = set(RopeScaling.__struct_fields__)
    if not isinstance(value, Mapping) or not {"kind", "factor"} <= set(value) <= known:
        raise _wrong(field, value, f"a mapping with kind, factor and perhaps more of {', '.join(sorted(known))}")
    coercers = {"original_max_position_embeddings": _coerce_int, "truncate": _coerce_bool}
    values: dict[str, typing.Any] = {
        key: coercers.get(key, _coerce_float)(field, number)
        for key, number in value.items()
        if key != "kind"
    }
    return RopeScaling(kind=value["kind"], **values)


def _parse_blocks(field: str, text: str) -> Blocks:
    try:
        return _coerce_blocks(field, json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ExportError(f"{field}: not valid JSON: {error}") from None


def _coerce_blocks(field: str, value: object) -> Blocks:
    """A list of mappings with the fields of `Block`."""
    if isinstance(value, Blocks):
        return value
    names = set(Block.__struct_fields__)
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) and set(entry) == names for entry in value):
        raise _wrong(field, value, f"a list with {', '.join(sorted(names))} of every layer")
    return Blocks(tuple(Block(**entry) for entry in value))


_PARSERS: dict[object, Callable[[str, str], object]] = {
    int: _parse_int,
    float: _parse_float,
    bool: _parse_bool,
    str: _parse_str,
    tuple: _parse_integers,
    RopeScaling: _parse_rope_scaling,
    Blocks: _parse_blocks,
}
_COERCERS: dict[object, Callable[[str, object], object]] = {
    int: _coerce_int,
    float: _coerce_float,
    bool: _coerce_bool,
    str: _coerce_str,
    tuple: _coerce_integers,
    RopeScaling: _coerce_rope_scaling,
    Blocks: _coerce_blocks,
}
