"""``torch_dist``: Megatron-Core's distributed checkpoints (``.metadata`` and ``.distcp`` files).

``.metadata`` is a pickle of torch.distributed.checkpoint.metadata.Metadata; a ``.distcp`` file is a plain
concatenation of records, each a whole ``torch.save`` zip, and the metadata is their only index.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from dist_export.checkpoint.gated_bias import check_gated_biases
from dist_export.checkpoint.ignored import ignored_reason
from dist_export.checkpoint.index import (
    CheckpointIndex,
    ObjectRecord,
    check_extents,
    readable_files,
    without_wrapper_prefix,
)
from dist_export.checkpoint.index_builder import IndexBuilder, Place
from dist_export.checkpoint.isolation import IN_PROCESS_BYTES, ParseLimits, in_child
from dist_export.checkpoint.metadata_records import ChunkStorageMetadata, TensorStorageMetadata
from dist_export.checkpoint.pickles import Metadata, load_metadata_pickle
from dist_export.checkpoint.torch_save import load_object
from dist_export.errors import ExportError
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import dtype_by_name

FORMAT = "torch_dist"
COMMON_STATE = "common_state/shard_0_1"
"""Key of the record that holds the common state from Megatron-Core 0.19 on; before, the file common.pt."""


def is_torch_dist(folder: Path) -> bool:
    """Whether an iteration folder says it is ``torch_dist`` (its metadata.json is written last)."""
    return says_backend(folder, FORMAT)


def says_backend(folder: Path, name: str) -> bool:
    """Whether the metadata.json of a distributed checkpoint names this backend."""
    try:
        return backend_of((folder / "metadata.json").read_bytes()) == name
    except OSError:
        return False


def backend_of(text: bytes) -> object:
    """The backend that a metadata.json names; None when it names none."""
    try:
        return json.loads(text).get("sharded_backend")
    except (ValueError, AttributeError, RecursionError):
        return None


def read_index(folder: Path) -> CheckpointIndex:
    """The chunk table of an iteration folder. Reads only ``.metadata`` and file sizes.

    A large ``.metadata`` is parsed by a process of its own under a memory limit (`checkpoint.isolation`).
    Raises `ExportError` for a missing or cut file, a pickle that names anything but the metadata classes,
    one that costs more than it may, and chunks that do not tile their tensors.
    """
    index = read_table(folder)
    check_files(index)
    return index


def check_files(index: CheckpointIndex) -> None:
    """`ExportError` naming files of the table that are missing or too short."""
    check_extents(index, readable_files(index))


def read_table(folder: Path) -> CheckpointIndex:
    """As `read_index`, without a look at any file but ``.metadata``."""
    path = folder / ".metadata"
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    return index_in_child(folder) if num_bytes > IN_PROCESS_BYTES else parse_index(folder)


def parse_index(folder: Path) -> CheckpointIndex:
    """As `read_index`, in this process and without a look at the files: memory is bounded by the pickle alone."""
    path = folder / ".metadata"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return build_index(folder, load_metadata_pickle(data, origin=str(path)))


def index_in_child(folder: Path, *, limits: ParseLimits | None = None) -> CheckpointIndex:
    """The chunk table of a ``torch_dist`` iteration folder, parsed by a child process within `limits`.

    Raises `ExportError` as `in_child` does.
    """
    path = folder / ".metadata"
    limits = limits or ParseLimits.for_size(path.stat().st_size)
    (table,) = in_child(packed_index, [[os.path.abspath(folder)]], names=[str(path)], limits=limits)
    return CheckpointIndex.from_buffer(table, origin=str(path))


def packed_index(folder: str) -> bytes:
    """In the child of `isolation`: what `parse_index` makes of a folder, as a buffer."""
    return parse_index(Path(folder)).to_bytes()


def _unreadable(path: Path, error: OSError) -> ExportError:
    return ExportError(f"{path}: {error.strerror}; the checkpoint is unfinished or not all of it was copied")


def read_common_state(index: CheckpointIndex) -> Mapping[str, object]:
    """Megatron's common state: saved arguments, iteration and the like, as plain values and inert records.

    Reads ``common.pt`` or the record that replaced it in Megatron-Core 0.19; empty when there is neither.
    """
    if COMMON_STATE in index.objects:
        record = index.objects[COMMON_STATE]
        return read_mapping(index.path(record.file), record.offset, record.length)
    return read_common_file(index.folder)


def read_common_file(folder: Path) -> Mapping[str, object]:
    """The content of ``common.pt``, empty without one."""
    path = folder / "common.pt"
    return read_mapping(path, 0, path.stat().st_size) if path.exists() else {}


def read_mapping(path: Path, offset: int, length: int) -> Mapping[str, object]:
    """The dictionary that ``torch.save`` wrote to a range of a file, alone or as the one element of a list."""
    value = load_object(path, offset, length)
    if isinstance(value, list) and len(value) == 1:  # a sharded object is saved as a list of one
        value = value[0]
    if not isinstance(value, Mapping):
        raise ExportError(f"{path}: the common state is a {type(value).__name__}, expected a dictionary")
    return value


def build_index(folder: Path, metadata: Metadata) -> CheckpointIndex:
    """The chunk table that metadata describes. Raises `ExportError` as `read_index`, without a look at the files."""
    builder = IndexBuilder(folder, FORMAT, chunks_are_records=True)
    places = _places(builder, metadata, folder)
    for key, entry in metadata.state_dict_metadata.items():
        name = without_wrapper_prefix(key)
        if not isinstance(entry, TensorStorageMetadata):
            found = list(places.get(key, {}).values())
            if len(found) == 1:
                builder.objects[name] = ObjectRecord(*found[0])
            else:
                builder.faults.add(f"{key}: an object with {len(found)} records, expected 1")
            continue
        reason = ignored_reason(name)
        dtype = entry.properties.dtype.removeprefix("torch.")
        if reason:
            itemsize = dtype_by_name(dtype, where=key).itemsize
            builder.ignore(reason, num_bytes=math.prod(entry.size) * itemsize)
        else:
            _add_tensor(builder, name, entry, dtype, places.get(key, {}))
    index = builder.build()
    check_gated_biases(index)
    return index


def _add_tensor(
    builder: IndexBuilder, name: str, entry: TensorStorageMetadata, dtype: str, places: Mapping[Shape, Place]
) -> None:
    itemsize = dtype_by_name(dtype, where=name).itemsize
    starts, sizes, found = [], [], []
    for stored in entry.chunks:
        place = places.get(stored.offsets)
        if place is None:
            builder.faults.add(f"{name}: chunk {_box(stored)} has no record in any file")
        elif place[2] < math.prod(stored.sizes) * itemsize:
            builder.faults.add(
                f"{name}: chunk {_box(stored)} of {dtype} cannot fit in its record of {place[2]} bytes"
            )
        else:
            starts.append(stored.offsets)
            sizes.append(stored.sizes)
            found.append(place)
    if len(found) == len(entry.chunks):
        builder.add_boxes(name, entry.size, dtype, starts=starts, sizes=sizes, places=found)


def _box(stored: ChunkStorageMetadata) -> str:
    return f"at {list(stored.offsets)} of size {list(stored.sizes)}"


def _places(builder: IndexBuilder, metadata: Metadata, folder: Path) -> dict[str, dict[Shape, Place]]:
    """Key -> chunk start -> place, of objects and of tensors that are not ignored."""
    places: dict[str, dict[Shape, Place]] = {
        key: {}
        for key, entry in metadata.state_dict_metadata.items()
        if not isinstance(entry, TensorStorageMetadata) or not ignored_reason(without_wrapper_prefix(key))
    }
    for entry, info in metadata.storage_data.items():
        if entry.fqn not in places:
            continue
        if info.transform_descriptors:
            raise ExportError(f"{folder}: {entry.fqn} is stored with the transform {info.transform_descriptors!r}")
        name = info.relative_path
        if os.sep in name or name in ("", ".", ".."):
            raise ExportError(f"{folder}: {entry.fqn} is said to be in {name!r}, which is not a file of this folder")
        if info.offset < 0 or info.length <= 0:
            raise ExportError(f"{folder}: {entry.fqn} is said to be at {info.offset} with {info.length} bytes")
        places[entry.fqn][entry.offset or ()] = (builder.file(name), info.offset, info.length)
    return places
