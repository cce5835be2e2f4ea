"""Layer states of rank files that the table has no place for: they are read from the files once more.

In legacy files that is the ``io.BytesIO`` of TransformerEngine 0.12 to 1.13, bytes inside of the pickle; in NeMo 1's
state dict files every state. Which layer of the model a rank's layer is, is told by its weights: the table says what
lies at their places.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from msgspec import Struct

from dist_export.checkpoint.archive import open_tar
from dist_export.checkpoint.hand_over import pack, unpack
from dist_export.checkpoint.index import CheckpointIndex, without_wrapper_prefix
from dist_export.checkpoint.isolation import IN_PROCESS_BYTES, Item, in_child
from dist_export.checkpoint.legacy_files import flat_items, read_member, read_saved
from dist_export.checkpoint.pickles import Record, TensorRef
from dist_export.checkpoint.rank_states import limits_of
from dist_export.checkpoint.saved_bytes import MOST_BYTES, SavedBytes
from dist_export.checkpoint.torch_save import SavedState
from dist_export.errors import ExportError

UNUSED = "state of layers that is no weight"
"""Reason under which the table counts states that have no place in it."""
STATE_DICT = "model_weights.ckpt"
"""A rank's file in an archive of NeMo 1."""
_SUFFIX = "._extra_state"
_SCALES = ("scale_fwd", "amax_history_fwd")
"""What is of interest in the states that TransformerEngine 0.1 to 0.5 left unpickled: a list, from 0.3 on a dict."""
_MOST_NUMBERS = 1 << 22
COMPILED = "._orig_mod"
"""What torch.compile puts into names."""
_CHUNK = re.compile(r"model\d{0,4}")
_LAYER = re.compile(r"^(?:decoder|mtp)\.layers\.\d+\.")
_LOCAL_EXPERT = re.compile(r"^.*\.local_experts\.\d+\.")

Places = dict[str, list[int]]
"""Start of a tensor's name -> where such tensors lie in the file."""


def states_in_ranks(index: CheckpointIndex) -> Iterator[tuple[str, str, bytes]]:
    """(module in the model, folder of the rank, its state's bytes) of every such state.

    States of layers whose weights the table took from another rank's file (replicas) are left out. Raises
    `ExportError` for files that cannot be read.
    """
    if UNUSED not in index.ignored or index.chunks_are_records:
        return
    names, files = _names_at(index), _files(index)
    for file, found in zip(files, _read_files(files), strict=True):
        for states, places in found:
            for local, data in states.items():
                module = _global_module(local, places, names.get(file.number, {}))
                if module is not None:
                    yield module, file.rank, data


class _File(Struct, frozen=True):
    """A rank's file."""

    path: str
    """What to open."""
    number: int
    """In the table, of what is opened: all files of an archive have that of the archive."""
    rank: str
    """Its folder."""
    name: str = ""
    """In the archive; empty for a file of its own."""
    base: int = 0
    size: int = 0


def _files(index: CheckpointIndex) -> list[_File]:
    """Raises `ExportError` for files that are gone."""
    if index.folder.is_file():
        path, found = str(index.folder.absolute()), sorted(open_tar(index.folder).files.items())
        states = [(name, each) for name, each in found if PurePosixPath(name).name == STATE_DICT]
        return [_File(path, 0, PurePosixPath(name).parent.name, name, each.base, each.size) for name, each in states]
    paths = [index.path(number) for number in range(len(index.files))]
    try:
        sizes = [path.stat().st_size for path in paths]
    except OSError as error:
        raise ExportError(f"{index.folder}: {error.strerror}: {error.filename}") from error
    return [
        _File(str(path.absolute()), number, path.parent.name, size=size)
        for number, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]


def _names_at(index: CheckpointIndex) -> dict[int, dict[int, str]]:
    found: dict[int, dict[int, str]] = {}
    for name in index.tensors:
        for chunk in index.chunks(name):
            found.setdefault(chunk.file, {})[chunk.offset] = name
    return found


def _read_files(files: list[_File]) -> Iterator[list[tuple[dict[str, bytes], Places]]]:
    sizes = [file.size for file in files]
    if sum(sizes) <= IN_PROCESS_BYTES:
        yield from (_read(file) for file in files)
        return
    items: list[Item] = [[file.path, file.name, file.base, file.size] for file in files]
    results = in_child(packed_states, items, names=[_where(file) for file in files], limits=limits_of(sizes))
    for file, result in zip(files, results, strict=True):
        yield unpack(result, origin=_where(file))


def packed_states(path: str, name: str, base: int, size: int) -> bytes:
    """In the child of `isolation`: the states of one file."""
    file = _File(path, 0, "", name, base, size)
    return pack(_read(file), origin=_where(file))


def _where(file: _File) -> str:
    return f"{file.path}: {file.name}" if file.name else file.path


def _read(file: _File) -> list[tuple[dict[str, bytes], Places]]:
    """Per model chunk: local module -> bytes of its state, and where the weights of its layers lie."""
    path = Path(file.path)
    saved = read_member(path, file.base, file.size, origin=_where(file)) if file.name else read_saved(path)
    state: Any = saved.value if isinstance(saved.value, Mapping) else {}
    chunks = [state[key] for key in state if isinstance(key, str) and _CHUNK.fullmatch(key)]
    return [_read_chunk(path, saved, chunk, tensors=False) for chunk in chunks] or [
        _read_chunk(path, saved, state, tensors=True)  # NeMo 1's state dict is the file
    ]


def _read_chunk(path: Path, saved: SavedState, chunk: object, *, tensors: bool) -> tuple[dict[str, bytes], Places]:
    """`tensors`: whether the table has no states at all, not even those that are tensors."""
    states: dict[str, bytes] = {}
    places: Places = {}
    dicts: dict[str, dict[str, object]] = {}
    for name, value in flat_items(chunk):
        name = without_wrapper_prefix(name).replace(COMPILED, "")
        module, inside, key = name.partition(f"{_SUFFIX}.")
        if inside:
            dicts.setdefault(module, {})[key] = value
        elif name.endswith(_SUFFIX) and isinstance(value, list):
            states[name.removesuffix(_SUFFIX)] = pickle.dumps([_plain(path, saved, name, each) for each in value], 2)
        elif name.endswith(_SUFFIX):
            content = _content(path, saved, name, value) if tensors or isinstance(value, Record) else None
            if content is not None:
                states[name.removesuffix(_SUFFIX)] = content
        elif isinstance(value, TensorRef):
            for start in _starts(name):
                places.setdefault(start, []).append(saved.tensor(value, name=name).offset)
    for module, state in dicts.items():
        known = {key: _plain(path, saved, f"{module}{_SUFFIX}.{key}", state.get(key)) for key in _SCALES}
        states[module] = pickle.dumps(known, 2)
    return states, places


def _plain(path: Path, saved: SavedState, name: str, value: object) -> object:
    """A float32 tensor as nested lists, as which `extra_state` takes it too; None for anything else."""
    if not isinstance(value, TensorRef) or value.dtype != "float32":
        return None
    record = saved.tensor(value, name=name)
    if len(record.shape) not in (1, 2) or math.prod(record.shape) > _MOST_NUMBERS:
        raise ExportError(f"{path}: {name} has shape {list(record.shape)}, which no scales and no history have")
    extent = 1 + sum((size - 1) * step for size, step in zip(record.shape, record.strides, strict=True))
    with path.open("rb") as file:
        flat = np.frombuffer(os.pread(file.fileno(), 4 * extent, record.offset), "<f4")
    strides = tuple(4 * step for step in record.strides)
    return np.lib.stride_tricks.as_strided(flat, record.shape, strides, writeable=False).tolist()


def _content(path: Path, saved: SavedState, name: str, value: object) -> bytes | None:
    if isinstance(value, TensorRef):
        record = saved.tensor(value, name=name)
        size = math.prod(record.shape)
        if record.dtype != "uint8" or record.strides != (1,) or size > MOST_BYTES:
            raise ExportError(
                f"{path}: {name} is {record.dtype} {list(record.shape)}, expected bytes of a layer's state"
            )
        with path.open("rb") as file:
            return os.pread(file.fileno(), size, record.offset)
    if not isinstance(value, Record):
        return None
    content = SavedBytes(value, f"{path}: {name}", b"", saved).content(value, name=name)
    if content is None:
        raise ExportError(f"{path}: {name} is an object of {value.kind}, expected io.BytesIO")
    return content


def _starts(name: str) -> Iterator[str]:
    for pattern in (_LAYER, _LOCAL_EXPERT):
        match = pattern.match(name)
        if match:
            yield match[0]


def _global_module(local: str, places: Places, names: Mapping[int, str]) -> str | None:
    """The module's name in the model; None where no weight of its layer is taken from this file."""
    layer = _LAYER.match(f"{local}.")
    if layer is None:
        return local
    expert = _LOCAL_EXPERT.match(local)
    start = expert[0] if expert else layer[0]
    known = next((names[place] for place in places.get(start, ()) if place in names), None)
    if known is None:
        return None
    pattern = re.compile(r"^.*\.experts\.experts\.\d+\.") if expert else _LAYER
    match = pattern.match(known)
    return None if match is None else match[0] + local[len(start) :]
