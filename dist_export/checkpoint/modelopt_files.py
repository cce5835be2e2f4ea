"""Where ModelOpt's state lies beside the weights, and reading it: plain values and inert stand-ins only."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from dist_export.checkpoint.archive import open_tar
from dist_export.checkpoint.file_tree import FileTree
from dist_export.checkpoint.index import CheckpointIndex, ObjectRecord, without_wrapper_prefix
from dist_export.checkpoint.metadata_records import BytesStorageMetadata
from dist_export.checkpoint.pickles import load_metadata_pickle
from dist_export.checkpoint.rank_states import read_saved_keys
from dist_export.checkpoint.saved_bytes import MOST_BYTES, read_bytes
from dist_export.checkpoint.torch_dist import COMMON_STATE
from dist_export.errors import ExportError

FOLDER = "modelopt_state"
MODELOPT_KEY = "modelopt_quantizer_state"
"""In the state of a layer whose quantisers ModelOpt has set."""
_MOST_LOOKED_AT = 1 << 18
_LEGACY = "legacy"
_MOST_METADATA = 1 << 21
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_QUANTIZER_STATE = "quantizer_state"
_LEGACY_KEYS = (FOLDER, *(f"{FOLDER}_{stage}" for stage in range(64)))


class SavedModelopt(Struct, frozen=True):
    """ModelOpt's global state as it was saved."""

    version: str
    modes: tuple[tuple[str, Mapping[str, Any]], ...]
    """(mode, {"config", "metadata"}), in the order they were applied."""
    origin: str
    quantizers: Mapping[str, Any] = field(default_factory=dict)
    """Full name of a quantiser, of the whole model, -> its properties; of ModelOpt before 0.29 and legacy files."""


def read_modelopt_files(index: CheckpointIndex) -> SavedModelopt | None:
    """The state beside the weights, None when there is none. Raises `ExportError` for one that cannot be read."""
    if index.format.partition(" (")[0] == _LEGACY:
        return _of_ranks(index)
    tree = _tree(index)
    if tree is None:
        return None
    records = dict(_records(tree))
    if "common.pt" in tree.files:
        common = _load(tree.read("common.pt", most=MOST_BYTES), tree.where("common.pt"))
    else:
        common = records.pop(COMMON_STATE, None)
    return _saved(common, tree.where("common state"), quantizers=dict(_quantizers_of(records)))


def tells_of_modelopt(index: CheckpointIndex) -> bool:
    """Whether the state of some layer was written by ModelOpt, as one of each kind of module shows: for a checkpoint of
    which the ``modelopt_state`` folder was not copied along."""
    found: dict[str, ObjectRecord] = {}
    for name, record in index.objects.items():
        module, state, _ = name.partition("._extra_state")
        if state:
            found.setdefault(re.sub(r"\d+", "", module), record)
    return any(MODELOPT_KEY.encode() in _begins(index.path(record.file), record) for record in found.values())


def _begins(path: Path, record: ObjectRecord) -> bytes:
    """The first bytes of an object; none where they cannot be read, which those who need them will tell."""
    try:
        with path.open("rb") as file:
            return os.pread(file.fileno(), min(record.length, _MOST_LOOKED_AT), record.offset)
    except OSError:
        return b""


def _tree(index: CheckpointIndex) -> FileTree | None:
    """The files of the ``modelopt_state`` folder."""
    if index.folder.is_file():
        files = open_tar(index.folder)
        folder = next((name.rpartition("/")[0] for name in files.files if f"{FOLDER}/" in f"/{name}"), None)
        return files.below(folder) if folder else None
    folder_path = index.folder / FOLDER
    return FileTree.of_folder(folder_path) if folder_path.is_dir() else None


def _records(tree: FileTree) -> Iterator[tuple[str, Any]]:
    """Sharded objects of the folder: of torch_dist by its ``.metadata``, of zarr a file each."""
    for name in tree.files:
        folder, _, last = name.rpartition("/")
        if folder and last.startswith("shard_") and last.endswith(".pt"):
            yield name.removesuffix(".pt"), _load(tree.read(name, most=MOST_BYTES), tree.where(name))
    if ".metadata" not in tree.files:
        return
    where = tree.where(".metadata")
    metadata = load_metadata_pickle(tree.read(".metadata", most=_MOST_METADATA), origin=where)
    kinds = metadata.state_dict_metadata
    for entry, place in metadata.storage_data.items():
        if isinstance(kinds.get(entry.fqn), BytesStorageMetadata):
            data = _range(tree, place.relative_path, place.offset, place.length)
            yield entry.fqn, _load(data, f"{tree.root}: {entry.fqn}")


def _range(tree: FileTree, name: str, offset: int, length: int) -> bytes:
    data = tree.read(name, most=MOST_BYTES)
    if offset < 0 or length <= 0 or offset + length > len(data):
        raise ExportError(f"{tree.where(name)}: has {len(data)} bytes, a record is said to be at {offset} + {length}")
    return data[offset : offset + length]


def _load(data: bytes, origin: str) -> Any:
    value = read_bytes(data, origin=origin).value
    return value[0] if isinstance(value, list) and len(value) == 1 else value  # a sharded object is a list of one


def _saved(common: Any, origin: str, *, quantizers: Mapping[str, Any]) -> SavedModelopt:
    if not isinstance(common, Mapping):
        raise ExportError(f"{origin}: is missing, or a {type(common).__name__}; expected ModelOpt's dictionary")
    return SavedModelopt(str(common.get("modelopt_version", "")), _modes(common, origin), origin, quantizers)


def _modes(common: Mapping[str, Any], origin: str) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    modes = common.get("modelopt_state_dict")
    if not isinstance(modes, list | tuple):
        raise ExportError(f"{origin}: has no modelopt_state_dict; it holds {', '.join(map(str, common))[:200]}")
    found = []
    for entry in modes:
        pair = tuple(entry) if isinstance(entry, list | tuple) else ()
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Mapping):
            raise ExportError(f"{origin}: a mode of modelopt_state_dict is {entry!r:.120}, expected a name and a state")
        found.append(pair)
    return tuple(found)


def _quantizers_of(records: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of ModelOpt before 0.29: key -> {"quantizer_state": {rest: properties}}, older {rest: {"quantizer_state": …}}."""
    for key, value in records.items():
        head = without_wrapper_prefix(key.rpartition("/shard_")[0])
        if not isinstance(value, Mapping):
            continue
        inner = value.get(_QUANTIZER_STATE)
        if isinstance(inner, Mapping):
            yield from ((_joined(head, rest), properties) for rest, properties in inner.items())
            continue
        for rest, state in value.items():
            if isinstance(state, Mapping) and _QUANTIZER_STATE in state:
                yield _joined(head, rest), state[_QUANTIZER_STATE]


def _joined(head: str, rest: object) -> str:
    return f"{head.rstrip('.')}.{str(rest).lstrip('.')}"


def _of_ranks(index: CheckpointIndex) -> SavedModelopt | None:
    """Legacy files: the same modes in every rank, with the quantisers of its own layers, numbered from 0."""
    layers = _layers_of_files(index)
    result: SavedModelopt | None = None
    quantizers: dict[str, Any] = {}
    for file, path in enumerate(map(index.path, range(len(index.files)))):
        found = read_saved_keys(path, _LEGACY_KEYS)
        if not found and result is None:
            return None  # ModelOpt leaves its state in every rank or in none
        stages = [found[key] for key in _LEGACY_KEYS if key in found]
        saved = [_saved(stage, f"{path}: {FOLDER}", quantizers={}) for stage in stages]
        for name, properties in _numbered(saved, layers[file]):
            quantizers.setdefault(name, properties)
        result = result or (saved[0] if saved else None)
    return None if result is None else SavedModelopt(result.version, result.modes, result.origin, quantizers)


def _layers_of_files(index: CheckpointIndex) -> Mapping[int, Sequence[int]]:
    """File -> the layers of the model that it holds weights of, ascending."""
    found: dict[int, set[int]] = defaultdict(set)
    for name in index.tensors:
        match = _LAYER.match(name)
        if match:
            for chunk in index.chunks(name):
                found[chunk.file].add(int(match[1]))
    return defaultdict(tuple, {file: sorted(layers) for file, layers in found.items()})


def _numbered(stages: Sequence[SavedModelopt], layers: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Quantisers of a rank's virtual stages under their names in the model; none where layers cannot be matched."""
    states = [_in_metadata(stage) for stage in stages]
    counts = [len({match[1] for name in state if (match := _LAYER.match(name))}) for state in states]
    if sum(counts) != len(layers):
        return  # a rank whose dense layers are copies: the one they were taken from tells
    first = 0
    for state, count in zip(states, counts, strict=True):
        for name, properties in state.items():
            match = _LAYER.match(name)
            if match is None:
                yield name, properties
            elif int(match[1]) < count:
                yield f"decoder.layers.{layers[first + int(match[1])]}.{name[match.end() :]}", properties
        first += count


def _in_metadata(stage: SavedModelopt) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _, state in stage.modes:
        metadata = state.get("metadata")
        inner = metadata.get(_QUANTIZER_STATE) if isinstance(metadata, Mapping) else None
        if isinstance(inner, Mapping):
            found |= {without_wrapper_prefix(str(name)): properties for name, properties in inner.items()}
    return found
