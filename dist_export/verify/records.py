"""Stored tensors decoded by torch itself, which shares nothing with the reader that exports use.

Importing this module imports torch.
"""

from __future__ import annotations

import io
import pickle

import torch

from dist_export.checkpoint.index import CheckpointIndex, Chunk
from dist_export.errors import ExportError
from dist_export.tensors.boxes import Box


def read_box(index: CheckpointIndex, key: str, box: Box) -> torch.Tensor:
    """A box of a stored tensor.

    Raises `ExportError` when a record cannot be read, and for formats other than ``torch_dist``.
    """
    result: torch.Tensor | None = None
    for chunk in index.chunks(key, box):
        stored = _record(index, key, chunk)
        common = chunk.box.intersection(box)
        assert common is not None, f"{chunk.box} was said to touch {box}"
        result = stored.new_empty(box.size) if result is None else result
        result[_slices(common.relative_to(box.start))] = stored[_slices(common.relative_to(chunk.box.start))]
    assert result is not None, f"{key}: no chunk holds {box}"
    return result


def _record(index: CheckpointIndex, key: str, chunk: Chunk) -> torch.Tensor:
    """A record's tensor, decoded by torch under its restricted unpickler."""
    path = index.path(chunk.file)
    if not index.chunks_are_records:
        raise ExportError(f"{path}: reference logits are computed from torch_dist checkpoints only")
    try:
        with path.open("rb") as file:
            file.seek(chunk.offset)
            data = io.BytesIO(file.read(chunk.length))
        tensor = torch.load(data, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ExportError(f"{path}: the record of {key} at byte {chunk.offset} cannot be read: {error}") from error
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.box.size:
        raise ExportError(f"{path}: the record of {key} at byte {chunk.offset} does not hold {chunk.box}")
    return tensor


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))
