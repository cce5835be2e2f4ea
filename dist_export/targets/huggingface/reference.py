"""What an existing Hugging Face folder adds to an export: its configuration, tokenizer and vocabulary size.

The folder describes the same model, so anything it says that the checkpoint contradicts is an error.
Code is never taken over: no ``.py`` file, and no ``auto_map`` entry, which would make a loader run some.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from dist_export.errors import ExportError, Faults

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
"""Names that transformers' tokenizers load (transformers/tokenization_utils_base.py and the slow tokenizers)."""
GENERATION = "generation_config.json"

_MOST_JSON_BYTES = 64 << 20
_CODE = ("auto_map", "custom_pipelines")
_OURS = {"torch_dtype", "dtype", "use_cache", "transformers_version", "_name_or_path", "quantization_config"}
"""Fields of a reference that say nothing about the model, or that an export decides anew."""


class Reference(Struct, frozen=True):
    """A Hugging Face folder that describes the model being exported."""

    folder: Path
    config: Mapping[str, object]

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Read a folder's config.json; `ExportError` when there is none."""
        config = read_json(folder / "config.json")
        return cls(folder, config)

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary size it states."""
        size = self.config.get("vocab_size")
        return size if isinstance(size, int) else None

    def merged_config(self, ours: Mapping[str, object]) -> dict[str, object]:
        """`ours` with what only the reference says. Raises `ExportError` naming every contradiction."""
        faults = Faults(f"{self.folder / 'config.json'} contradicts the checkpoint")
        for key, value in ours.items():
            theirs = self._value(key)
            if key not in _OURS and theirs is not None and not _equal(theirs, value):
                faults.add(f"{key} is {theirs!r} there, {value!r} in the checkpoint")
        faults.raise_if_any()
        kept = {k: v for k, v in self.config.items() if k not in _OURS and k not in _CODE and k not in _ROPE_TABLE}
        return {**kept, **ours}

    def _value(self, key: str) -> object:
        """A field, also where newer transformers keep it inside ``rope_parameters``."""
        nested = self.config.get("rope_parameters")
        if key in self.config or not isinstance(nested, Mapping):
            return self.config.get(key)
        if key == "rope_scaling":
            inner = {k: v for k, v in nested.items() if k not in ("rope_theta", "partial_rotary_factor")}
            return None if inner.get("rope_type") == "default" else inner
        return nested.get(key)


_ROPE_TABLE = ("rope_parameters",)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer files of a folder by name; `ExportError` when it has none."""
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    found |= {path.name: path for path in sorted(folder.glob("*.tiktoken"))}
    if not found:
        raise ExportError(f"{folder}: holds no tokenizer files (looked for {', '.join(TOKENIZER_FILES[:4])}, …)")
    return found


def without_code(name: str, data: bytes) -> bytes:
    """A tokenizer file as it may be published: JSON loses entries that name code to run."""
    if not name.endswith(".json"):
        return data
    value = json.loads(data)
    if not isinstance(value, dict) or not any(key in value for key in _CODE):
        return data
    kept = {key: entry for key, entry in value.items() if key not in _CODE}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, object]:
    """A small JSON object; `ExportError` naming the file when it is not one."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ExportError(f"{path}: larger than any such file should be")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _equal(theirs: object, ours: object) -> bool:
    """Equal values; in nested tables only what both say is compared, since defaults are left out."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        names = {"type": "rope_type"}
        table = {names.get(key, key): value for key, value in theirs.items()}
        return all(_equal(table[key], value) for key, value in ours.items() if key in table)
    return theirs == ours
