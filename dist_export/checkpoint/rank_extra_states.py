"""Layer states of rank files that the table has no place for: they are read from the files once more.

In legacy files that is the ``io.BytesIO`` of TransformerEngine 0.12 to 1.13, bytes inside of the pickle; in NeMo 1's
state dict files every state. Which layer of the model a rank's layer is, is told by its weights: the table says what
lies at their places.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_export.checkpoint.hand_over import pack, unpack
from dist_export.checkpoint.index import CheckpointIndex, without_wrapper_prefix
from dist_export.checkpoint.isolation import IN_PROCESS_BYTES, Item, in_child
from dist_export.checkpoint.legacy_files import flat_items, read_saved
from dist_export.checkpoint.pickles import Record, TensorRef
from dist_export.checkpoint.rank_states import limits_of
from dist_export.checkpoint.saved_bytes import MOST_BYTES, SavedBytes
from dist_export.checkpoint.torch_save import SavedState
from dist_export.errors import ExportError

UNUSED = "state of layers that is no weight"
"""Reason under which the table counts states that have no place in it."""
_SUFFIX = "._extra_state"
COMPILED = "._orig_mod"
"""What torch.compile puts into names."""
_CHUNK = re.compile(r"model\d{0,4}")
_LAYER = re.compile(r"^(?:decoder|mtp)\.layers\.\d+\.")
_LOCAL_EXPERT = re.compile(r"^.*\.local_experts\.\d+\.")

Places = dict[str, list[int]]
"""Start of a tensor's name -> where such tensors lie in the file."""


def states_in_ranks(index: CheckpointIndex) -> Iterator[tuple[str, str, bytes]]:
    """(module in the model, folder of the rank, its state's bytes) of every such state; none of files in an archive.

    States of layers whose weights the table took from another rank's file (replicas) are left out. Raises
    `ExportError` for files that cannot be read.
    """
    if UNUSED not in index.ignored or index.chunks_are_records or index.folder.is_file():
        return
    names = _names_at(index)
    for file, found in enumerate(_read_files(index)):
        rank = index.path(file).parent.name
        for states, places in found:
            for local, data in states.items():
                module = _global_module(local, places, names.get(file, {}))
                if module is not None:
                    yield module, rank, data


def _names_at(index: CheckpointIndex) -> dict[int, dict[int, str]]:
    found: dict[int, dict[int, str]] = {}
    for name in index.tensors:
        for chunk in index.chunks(name):
            found.setdefault(chunk.file, {})[chunk.offset] = name
    return found


def _read_files(index: CheckpointIndex) -> Iterator[list[tuple[dict[str, bytes], Places]]]:
    paths = [index.path(number) for number in range(len(index.files))]
    try:
        sizes = [path.stat().st_size for path in paths]
    except OSError as error:
        raise ExportError(f"{index.folder}: {error.strerror}: {error.filename}") from error
    if sum(sizes) <= IN_PROCESS_BYTES:
        yield from (_read(path) for path in paths)
        return
    items: list[Item] = [[str(path.absolute())] for path in paths]
    results = in_child(packed_states, items, names=list(map(str, paths)), limits=limits_of(sizes))
    for path, result in zip(paths, results, strict=True):
        yield unpack(result, origin=str(path))


def packed_states(path: str) -> bytes:
    """In the child of `isolation`: the states of one file."""
    return pack(_read(Path(path)), origin=path)


def _read(path: Path) -> list[tuple[dict[str, bytes], Places]]:
    """Per model chunk: local module -> bytes of its state, and where the weights of its layers lie."""
    saved = read_saved(path)
    state: Any = saved.value if isinstance(saved.value, Mapping) else {}
    chunks = [state[key] for key in state if isinstance(key, str) and _CHUNK.fullmatch(key)]
    return [_read_chunk(path, saved, chunk, tensors=False) for chunk in chunks] or [
        _read_chunk(path, saved, state, tensors=True)  # NeMo 1's state dict is the file
    ]


def _read_chunk(path: Path, saved: SavedState, chunk: object, *, tensors: bool) -> tuple[dict[str, bytes], Places]:
    """`tensors`: whether the table has no states at all, not even those that are tensors."""
    states: dict[str, bytes] = {}
    places: Places = {}
    for name, value in flat_items(chunk):
        name = without_wrapper_prefix(name).replace(COMPILED, "")
        if name.endswith(_SUFFIX):
            content = _content(path, saved, name, value) if tensors or isinstance(value, Record) else None
            if content is not None:
                states[name.removesuffix(_SUFFIX)] = content
        elif isinstance(value, TensorRef):
            for start in _starts(name):
                places.setdefault(start, []).append(saved.tensor(value, name=name).offset)
    return states, places


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
