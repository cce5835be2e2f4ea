"""Two chunk tables as one: tensors of two checkpoints, each in its own folder."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from dist_export.checkpoint.index import CheckpointIndex, Columns
from dist_export.tensors.boxes import row_major_strides
from dist_export.tensors.dtypes import dtype_by_name


def joined(first: CheckpointIndex, second: CheckpointIndex, **more: object) -> CheckpointIndex:
    """The tensors of both, which have different names, as a table of `first` (its folder, format and objects).

    `more` goes to the header. Where one table's chunks are records and the other's are not, those that are not say
    where their elements lie, so that nothing has to be read.
    """
    header, own = first.parts
    other_header, other = second.parts
    names = list(header["dtype_names"])
    names += [name for name in other_header["dtype_names"] if name not in names]
    numbers = np.array([names.index(name) for name in other_header["dtype_names"]], np.int64)
    places = other.places.reshape(-1, 3).copy()
    places[:, 0] += len(first.files)
    plain = first.chunks_are_records == second.chunks_are_records
    strides = [_strides(each, explicit=not plain and not each.chunks_are_records) for each in (first, second)]
    arrays: dict[str, Any] = {
        name: np.concatenate((getattr(own, name), getattr(other, name)))
        for name in ("name_bytes", "num_dims", "num_chunks", "reach", "shapes", "boxes")
    }
    columns = Columns(
        **arrays,
        name_ends=np.concatenate((own.name_ends, other.name_ends + len(own.name_bytes))),
        dtypes=np.concatenate((own.dtypes, numbers[other.dtypes])),
        places=np.concatenate((own.places, places.reshape(-1))),
        stride_chunks=np.concatenate((strides[0][0], strides[1][0] + first.num_chunks)),
        strides=np.concatenate((strides[0][1], strides[1][1])),
    )
    files = [*first.files, *(os.path.abspath(second.path(number)) for number in range(len(second.files)))]
    records = first.chunks_are_records or second.chunks_are_records
    changes = {"dtype_names": names, "files": files, "chunks_are_records": records, **more}
    return CheckpointIndex({**header, **changes}, columns)


def _strides(index: CheckpointIndex, *, explicit: bool) -> tuple[Any, Any]:
    """(numbers of chunks with strides, their strides); of all chunks when `explicit`."""
    columns = index.parts[1]
    if not explicit:
        return columns.stride_chunks, columns.strides
    steps: list[int] = []
    for name, info in index.tensors.items():
        itemsize = dtype_by_name(info.dtype, where=name).itemsize
        for chunk in index.chunks(name):
            steps += chunk.strides or (step * itemsize for step in row_major_strides(chunk.box.size))
    assert len(steps) == int((columns.num_dims * columns.num_chunks).sum()), "a step per dim of every chunk"
    return np.arange(index.num_chunks, dtype=np.int64), np.array(steps, np.int64)
