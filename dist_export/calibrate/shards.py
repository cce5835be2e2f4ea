"""A rank's own part of a stored tensor, read without the rest of its chunks. Importing this module imports torch."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from dist_export.convert.sources import SourceFiles
from dist_export.tensors.boxes import Box
from dist_export.tensors.dtypes import dtype_by_name
from dist_export.tensors.views import Slab
from dist_export.verify.source_reader import SourceReader


def read_box(sources: SourceFiles, key: str, box: Box) -> torch.Tensor:
    """A box of a stored tensor, in its stored element type: of every chunk only the bytes that lie in the box.

    Raises `ExportError` when a file ends before, or a record is not what the metadata says.
    """
    stored = sources.index.tensors[key]
    dtype, num_fixed = dtype_by_name(stored.dtype), max(len(box.size) - 2, 0)
    result = np.zeros(box.size, f"u{dtype.itemsize}")
    shape, reader = stored.shape[num_fixed:], SourceReader(sources)
    leading = zip(box.start[:num_fixed], box.size[:num_fixed], strict=True)
    fixed = (range(start, start + size) for start, size in leading)
    for prefix in itertools.product(*fixed):
        slab = Slab(key, prefix)
        wanted = Box((*prefix, *box.start[num_fixed:]), (*(1 for _ in prefix), *box.size[num_fixed:]))
        for chunk, common in sources.chunks_of(slab, shape):
            part = common.intersection(wanted)
            if part is None:
                continue
            rectangle = sources.rectangle(slab, chunk, part, dtype)
            inner = part.relative_to(box.start)
            place = tuple(slice(start, start + size) for start, size in zip(inner.start, inner.size, strict=True))
            size = (rectangle.rows[1] - rectangle.rows[0], rectangle.columns[1] - rectangle.columns[0])
            block = np.empty(size, result.dtype)
            reader.read_rectangle(rectangle, rectangle.rows[0], block)
            result[place] = block.reshape(inner.size)
    return torch.from_numpy(result.reshape(-1).view(np.uint8)).view(getattr(torch, dtype.name)).reshape(box.size)
