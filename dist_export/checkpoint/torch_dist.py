"""``torch_dist``: Megatron-Core's distributed checkpoints (``.metadata`` and ``.distcp`` files).

``.metadata`` is a pickle of torch.distributed.checkpoint.metadata.Metadata; a ``.distcp`` file is a plain
concatenation of records, each a whole ``torch.save`` zip, and the metadata is their only index.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_export.checkpoint.ignored import ignored_reason
from dist_export.checkpoint.index import (
    CheckpointIndex,
    Chunk,
    IndexBuilder,
    ObjectRecord,
    check_extents,
    readable_files,
    without_wrapper_prefix,
)
from dist_export.checkpoint.pickles import Record, cut_local_plans, load_metadata_pickle
from dist_export.checkpoint.torch_save import read_state
from dist_export.errors import ExportError
from dist_export.tensors.boxes import Box, Shape
from dist_export.tensors.dtypes import dtype_by_name

FORMAT = "torch_dist"
COMMON_STATE = "common_state/shard_0_1"
"""Key of the record that holds the common state from Megatron-Core 0.19 on; before, the file common.pt."""


def is_torch_dist(folder: Path) -> bool:
    """Whether an iteration folder says it is ``torch_dist`` (its metadata.json is written last)."""
    try:
        text = (folder / "metadata.json").read_text()
        return bool(json.loads(text).get("sharded_backend") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def read_index(folder: Path) -> CheckpointIndex:
    """The chunk table of an iteration folder. Reads only ``.metadata`` and file sizes.

    Raises `ExportError` for a missing or cut file, a pickle that names anything but the metadata classes,
    and chunks that do not tile their tensors.
    """
    path = folder / ".metadata"
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"{path}: {error.strerror}; the checkpoint is unfinished or not all of it was copied"
        raise ExportError(message) from error
    metadata = load_metadata_pickle(cut_local_plans(data), origin=str(path))
    index = _build(folder, metadata)
    check_extents(index, readable_files(index))
    return index


def read_common_state(index: CheckpointIndex) -> Mapping[str, object]:
    """Megatron's common state: saved arguments, iteration and the like, as plain values and inert records.

    Reads ``common.pt`` or the record that replaced it in Megatron-Core 0.19; empty when there is neither.
    """
    path, offset, length = index.folder / "common.pt", 0, 0
    if COMMON_STATE in index.objects:
        record = index.objects[COMMON_STATE]
        path, offset, length = index.path(record.file), record.offset, record.length
    elif path.exists():
        length = path.stat().st_size
    else:
        return {}
    with path.open("rb") as file:
        state = read_state(lambda at, size: os.pread(file.fileno(), size, at), offset, length, origin=str(path))
    value = state.value
    if isinstance(value, list) and len(value) == 1:  # a sharded object is saved as a list of one
        value = value[0]
    if not isinstance(value, Mapping):
        raise ExportError(f"{path}: the common state is a {type(value).__name__}, expected a dictionary")
    return value


def _build(folder: Path, metadata: Any) -> CheckpointIndex:
    builder = IndexBuilder(folder, FORMAT, chunks_are_records=True)
    places = _places(builder, metadata, folder)
    for key, entry in metadata.state_dict_metadata.items():
        size = getattr(entry, "size", None)
        name = without_wrapper_prefix(key)
        if size is None:
            (place,) = places.get(key, {}).values() or (None,)
            if place is None:
                builder.faults.add(f"{key}: an object without a record")
            else:
                builder.objects[name] = ObjectRecord(*place)
            continue
        reason = ignored_reason(name)
        dtype = _dtype_name(entry.properties)
        if reason:
            itemsize = dtype_by_name(dtype, where=key).itemsize
            builder.ignore(reason, num_bytes=math.prod(size) * itemsize)
        else:
            _add_tensor(builder, name, entry, dtype, places.get(key, {}))
    return builder.build()


def _add_tensor(
    builder: IndexBuilder, name: str, entry: Any, dtype: str, places: Mapping[Shape, tuple[int, int, int]]
) -> None:
    shape = tuple(entry.size)
    chunks = []
    for stored in entry.chunks:
        box = Box(tuple(stored.offsets), tuple(stored.sizes))
        place = places.get(box.start)
        if len(box.start) != len(shape) or len(box.size) != len(shape) or not box.inside(shape):
            builder.faults.add(f"{name}: chunk {box} is outside its shape {list(shape)}")
        elif place is None:
            builder.faults.add(f"{name}: chunk {box} has no record in any file")
        elif place[2] < box.num_elements * dtype_by_name(dtype, where=name).itemsize:
            builder.faults.add(f"{name}: chunk {box} of {dtype} cannot fit in its record of {place[2]} bytes")
        else:
            chunks.append(Chunk(box, *place))
    if len(chunks) == len(entry.chunks):
        builder.add(name, shape, dtype, chunks)


def _places(builder: IndexBuilder, metadata: Any, folder: Path) -> dict[str, dict[Shape, tuple[int, int, int]]]:
    """Key -> chunk start -> (file number, offset, length)."""
    places: dict[str, dict[Shape, tuple[int, int, int]]] = defaultdict(dict)
    for entry, info in metadata.storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise ExportError(f"{folder}: {entry.fqn} is stored with the transform {info.transform_descriptors!r}")
        name = str(info.relative_path)
        if os.sep in name or name in ("", ".", ".."):
            raise ExportError(f"{folder}: {entry.fqn} is said to be in {name!r}, which is not a file of this folder")
        if info.offset < 0 or info.length <= 0:
            raise ExportError(f"{folder}: {entry.fqn} is said to be at {info.offset} with {info.length} bytes")
        start = tuple(entry.offset) if entry.offset is not None else ()
        places[entry.fqn][start] = (builder.file(name), info.offset, info.length)
    return places


def _dtype_name(properties: Any) -> str:
    """The element type's name out of TensorProperties, whatever torch release pickled it."""
    dtype = properties.dtype if not isinstance(properties, Record) else properties.get("dtype")
    return str(dtype).removeprefix("torch.")
