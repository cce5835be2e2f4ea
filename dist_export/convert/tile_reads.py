"""Reading a tile's part of a chunk: in one go, line by line, or line by line of a chunk that is stored transposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_export.convert.tiles import Tile, TileRead

Block = npt.NDArray[Any]
"""[rows, columns] of raw elements, as unsigned integers of the element's size."""
ReadInto = Callable[[int, int, memoryview], None]
"""(file, offset, buffer): fill the buffer from there, as `SourceFiles.read_into` does."""


def read_part(tile: Tile, read: TileRead, memory: memoryview, read_into: ReadInto) -> Block:
    """The rows of `tile` in the columns of `read`, in `memory`, which holds at least the bytes that they take."""
    rectangle, itemsize = read.rectangle, tile.item.dtype.itemsize
    num_rows, num_columns = tile.rows[1] - tile.rows[0], read.columns[1] - read.columns[0]
    offset = (
        rectangle.offset
        + (tile.rows[0] - rectangle.rows[0]) * rectangle.row_stride
        + (read.columns[0] - rectangle.columns[0]) * rectangle.column_stride
    )
    if read.whole_rows:
        read_into(rectangle.file, offset, memory[: read.num_bytes(num_rows, itemsize)])
        stride, shape = (rectangle.row_stride, itemsize), (num_rows, num_columns)
        whole: Block = np.ndarray(shape, f"u{itemsize}", memory, strides=stride)
        return whole
    if rectangle.column_stride == itemsize:
        shape, stride_of_lines = (num_rows, num_columns), rectangle.row_stride
    else:  # Stored transposed: what is a column here is contiguous there.
        shape, stride_of_lines = (num_columns, num_rows), rectangle.column_stride
    num_bytes = shape[1] * itemsize
    for line in range(shape[0]):
        part = memory[line * num_bytes : (line + 1) * num_bytes]
        read_into(rectangle.file, offset + line * stride_of_lines, part)
    lines: Block = np.ndarray(shape, f"u{itemsize}", memory)
    return lines if rectangle.column_stride == itemsize else np.transpose(lines)
