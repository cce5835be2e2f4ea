"""Reading the checkpoint for a comparison: rows of a source tensor, put together from the chunks that hold them.

Shares nothing with the executor but where the chunks lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from dist_export.convert.sources import SourceFiles, SourceRectangle
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.work import SlabUses, flat_shape
from dist_export.tensors.dtypes import dtype_by_name
from dist_export.verify.output import Block


class SourceReader(Struct, frozen=True):
    """Reads rows of source tensors. Thread-safe as its source is."""

    sources: SourceFiles

    def tensor(self, tensor: SourceTensor, rows: tuple[int, int] | None = None) -> Block:
        """Rows of a tensor taken as a matrix ``[rows, last dim]`` (all of them by default), raw."""
        whole = SlabUses(tensor.slab, tensor.shape, dtype_by_name(tensor.dtype), ())
        rectangles = self.sources.rectangles(whole.slab, whole.shape, whole.dtype)
        return self.read(whole, rectangles, rows or (0, flat_shape(tensor.shape)[0]))

    def read(self, slab: SlabUses, rectangles: Sequence[SourceRectangle], rows: tuple[int, int]) -> Block:
        """All columns of a band of rows, put together from the chunks that hold them."""
        _, width = flat_shape(slab.shape)
        band: Block = np.empty((rows[1] - rows[0], width), f"u{slab.dtype.itemsize}")
        for rectangle in rectangles:
            first, end = max(rows[0], rectangle.rows[0]), min(rows[1], rectangle.rows[1])
            if first < end:
                part = band[first - rows[0] : end - rows[0], rectangle.columns[0] : rectangle.columns[1]]
                self.read_rectangle(rectangle, first, part)
        return band

    def read_rectangle(self, rectangle: SourceRectangle, first: int, part: Block) -> None:
        """Fill `part` [rows, all columns of the chunk] from row `first` of the slab on."""
        (num_rows, num_columns), itemsize = part.shape, part.itemsize
        start = rectangle.offset + (first - rectangle.rows[0]) * rectangle.row_stride
        if rectangle.column_stride != itemsize and num_columns > 1:  # stored transposed, column by column
            column: Block = np.empty(num_rows, part.dtype)
            for number in range(num_columns):
                offset = start + number * rectangle.column_stride
                self.sources.read_into(rectangle.file, offset, column.data.cast("B"))
                part[:, number] = column
        elif rectangle.row_stride == num_columns * itemsize or num_rows == 1:
            whole = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
            self.sources.read_into(rectangle.file, start, whole.data.cast("B"))
            if whole is not part:
                part[...] = whole
        else:
            for number in range(num_rows):
                row = part[number].data.cast("B")
                self.sources.read_into(rectangle.file, start + number * rectangle.row_stride, row)
