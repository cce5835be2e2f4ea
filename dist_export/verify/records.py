"""Stored tensors of any format, read without the tiles of an export: records are decoded by torch itself.

Where bytes lie is the chunk table's word, as for an export; most formats have no other reader that could be asked.

Importing this module imports torch.
"""

from __future__ import annotations

import io
import pickle

import torch

from dist_export.checkpoint.index import CheckpointIndex, Chunk
from dist_export.errors import ExportError
from dist_export.tensors.boxes import Box, row_major_strides


def read_box(index: CheckpointIndex, key: str, box: Box) -> torch.Tensor:
    """A box of a stored tensor, in its stored element type. Raises `ExportError` when it cannot be read."""
    result: torch.Tensor | None = None
    for chunk in index.chunks(key, box):
        stored = _read_chunk(index, key, chunk)
        common = chunk.box.intersection(box)
        assert common is not None, f"{chunk.box} was said to touch {box}"
        result = stored.new_empty(box.size) if result is None else result
        result[_slices(common.relative_to(box.start))] = stored[_slices(common.relative_to(chunk.box.start))]
    assert result is not None, f"{key}: no chunk holds {box}"
    return result


def _read_chunk(index: CheckpointIndex, key: str, chunk: Chunk) -> torch.Tensor:
    path = index.path(chunk.file)
    is_record = index.chunks_are_records and chunk.strides is None
    try:
        if is_record:
            with path.open("rb") as file:
                file.seek(chunk.offset)
                data = io.BytesIO(file.read(chunk.length))
            tensor = torch.load(data, map_location="cpu", weights_only=True)  # torch's restricted unpickler
        else:
            tensor = _read_raw(index, key, chunk)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ExportError(f"{path}: {key} at byte {chunk.offset} cannot be read: {error}") from error
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.box.size:
        raise ExportError(f"{path}: the record of {key} at byte {chunk.offset} does not hold {chunk.box}")
    return tensor


def _read_raw(index: CheckpointIndex, key: str, chunk: Chunk) -> torch.Tensor:
    """Elements that lie bare in a file, row-major or at the chunk's strides."""
    dtype: torch.dtype = getattr(torch, index.tensors[key].dtype)
    size, strides = chunk.box.size, row_major_strides(chunk.box.size)
    if chunk.strides is not None:
        strides = tuple(step // dtype.itemsize for step in chunk.strides)
    num_elements = 1 + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
    with index.path(chunk.file).open("rb") as file:
        file.seek(chunk.offset)
        data = bytearray(file.read(num_elements * dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype, count=num_elements).as_strided(size, strides)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))
