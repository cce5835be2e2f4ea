"""``zarr``: Megatron-Core's distributed checkpoints of releases 0.4 to 0.15.

A folder per key with ``.zarray`` (zarr version 2, JSON) and one raw little-endian file per cell of the grid, named
by its position: ``0.3.1``. Megatron writes no compressor, no filters and no fill value, in row-major order
(megatron/core/dist_checkpointing/strategies/zarr.py, `_create_zarr_array`). Cells on the upper edge are stored whole
where the grid does not divide the shape. bfloat16 is named ``"bfloat16"``, which zarr itself does not know, so cells
are read without the zarr library.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from msgspec import Struct

from dist_export.checkpoint import torch_dist
from dist_export.checkpoint.file_tree import FileTree, StoredFile
from dist_export.checkpoint.gated_bias import check_gated_biases
from dist_export.checkpoint.ignored import ignored_reason
from dist_export.checkpoint.index import CheckpointIndex, ObjectRecord, without_wrapper_prefix
from dist_export.checkpoint.index_builder import IndexBuilder, Place
from dist_export.errors import ExportError, Faults
from dist_export.tensors.boxes import Shape, row_major_strides
from dist_export.tensors.dtypes import dtype_by_name

FORMAT = "zarr"
_MOST_JSON = 1 << 20  # bytes; a .zarray has about 300
_MOST_DIMS = 16
_LARGEST = 1 << 62
_DTYPES = {
    "bfloat16": "bfloat16",
    "<f8": "float64",
    "<f4": "float32",
    "<f2": "float16",
    "<i8": "int64",
    "<i4": "int32",
    "<i2": "int16",
    "|b1": "bool",
    "|u1": "uint8",
    "|i1": "int8",
}
_NOT_CELLS = {".zarray", ".zattrs"}


def is_zarr(folder: Path) -> bool:
    """Whether an iteration folder says that it is ``zarr``."""
    return torch_dist.says_backend(folder, FORMAT)


def read_index(folder: Path) -> CheckpointIndex:
    """The chunk table of an iteration folder. Reads every ``.zarray`` and the sizes of all files.

    Raises `ExportError` naming arrays that are compressed or of another layout, and cells that are missing or of the
    wrong size.
    """
    return read_tree(FileTree.of_folder(folder))


def read_tree(tree: FileTree) -> CheckpointIndex:
    """The same for files in an archive."""
    builder = IndexBuilder(tree.root, FORMAT, chunks_are_records=False)
    faults = Faults(f"{tree.root}: arrays cannot be read")
    arrays = _arrays(tree)
    for key, cells in arrays.items():
        try:
            _add_array(builder, key, _header(tree, key), cells)
        except ExportError as error:
            faults.add(str(error))
    faults.raise_if_any()
    _add_objects(builder, tree, arrays)
    index = builder.build()
    check_gated_biases(index)
    return index


def read_common_state(index: CheckpointIndex) -> Mapping[str, object]:
    """The content of ``common.pt``."""
    return torch_dist.read_common_file(index.folder)


def _arrays(tree: FileTree) -> dict[str, dict[str, StoredFile]]:
    """Key -> name of a file in its folder -> the file."""
    found: defaultdict[str, dict[str, StoredFile]] = defaultdict(dict)
    for path, file in tree.files.items():
        folder, _, name = path.rpartition("/")
        found[folder][name] = file
    return {key: files for key, files in found.items() if key and ".zarray" in files}


def _add_objects(builder: IndexBuilder, tree: FileTree, arrays: Mapping[str, object]) -> None:
    """Sharded objects are ``NAME/shard_0_4.pt``; the name may contain no array's."""
    for path, file in tree.files.items():
        folder, _, name = path.rpartition("/")
        if folder and folder not in arrays and name.startswith("shard_") and name.endswith(".pt"):
            key = without_wrapper_prefix(f"{folder}/{name.removesuffix('.pt')}")
            builder.objects[key] = ObjectRecord(builder.file(file.name), file.base, file.size)


class _Header(Struct, frozen=True):
    """A checked ``.zarray``."""

    shape: Shape
    cell: Shape
    dtype: str
    separator: str

    @property
    def grid(self) -> Shape:
        return tuple(-(-size // step) for size, step in zip(self.shape, self.cell, strict=True))

    @property
    def cell_bytes(self) -> int:
        return math.prod(self.cell) * dtype_by_name(self.dtype, where=".zarray").itemsize

    def cells(self) -> Iterator[tuple[str, Shape, Shape, Shape | None]]:
        """(file name, start, size, strides in bytes where the cell reaches over the edge) of every cell."""
        itemsize = dtype_by_name(self.dtype, where=".zarray").itemsize
        whole = tuple(step * itemsize for step in row_major_strides(self.cell))
        for position in product(*map(range, self.grid)):
            start = tuple(p * step for p, step in zip(position, self.cell, strict=True))
            size = tuple(min(step, n - a) for step, n, a in zip(self.cell, self.shape, start, strict=True))
            yield self.separator.join(map(str, position)) or "0", start, size, None if size == self.cell else whole


def _header(tree: FileTree, key: str) -> _Header:
    name = f"{key}/.zarray"
    try:
        values = json.loads(tree.read(name, most=_MOST_JSON))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{key}/.zarray: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ExportError(f"{key}/.zarray: not a JSON object")
    for field, wanted in (("zarr_format", 2), ("order", "C")):
        if values.get(field) != wanted:
            raise ExportError(f"{key}/.zarray: {field} is {values.get(field)!r:.60}, expected {wanted!r}")
    for field in ("compressor", "filters"):
        if values.get(field):
            raise ExportError(
                f"{key}/.zarray: {field} is {values[field]!r:.80}; Megatron stores plain cells: decode the array with "
                "the zarr library and write it again without a compressor and filters"
            )
    return _Header(*_shapes(key, values), _dtype(key, values), _separator(key, values))


def _shapes(key: str, values: Mapping[str, Any]) -> tuple[Shape, Shape]:
    shape, cell = values.get("shape"), values.get("chunks")
    for name, sizes in (("shape", shape), ("chunks", cell)):
        if not isinstance(sizes, list) or not all(type(n) is int and 0 < n < _LARGEST for n in sizes):
            raise ExportError(f"{key}/.zarray: {name} is {sizes!r:.80}, expected positive integers")
    assert isinstance(shape, list) and isinstance(cell, list)
    if len(shape) != len(cell) or len(shape) > _MOST_DIMS or math.prod(cell) >= _LARGEST:
        raise ExportError(f"{key}/.zarray: shape {shape!r:.80} and chunks {cell!r:.80} do not belong together")
    return tuple(shape), tuple(cell)


def _dtype(key: str, values: Mapping[str, Any]) -> str:
    name = values.get("dtype")
    found = _DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise ExportError(f"{key}/.zarray: dtype is {name!r:.60}, expected one of {', '.join(_DTYPES)}")
    return found


def _separator(key: str, values: Mapping[str, Any]) -> str:
    separator = values.get("dimension_separator", ".")
    if separator != ".":
        raise ExportError(f"{key}/.zarray: dimension_separator is {separator!r:.20}, expected '.'")
    return "."


def _add_array(builder: IndexBuilder, key: str, header: _Header, files: Mapping[str, StoredFile]) -> None:
    name = without_wrapper_prefix(key)
    num_cells, num_files = math.prod(header.grid), len(files.keys() - _NOT_CELLS)
    if num_cells != num_files:  # before any loop over a grid of whatever size the header claims
        raise ExportError(f"{key}: {num_files} cell files, expected {num_cells} of the grid {list(header.grid)}")
    reason = ignored_reason(name)
    if reason:
        builder.ignore(reason, num_bytes=num_cells * header.cell_bytes)
        return
    starts: list[Shape] = []
    sizes: list[Shape] = []
    places: list[Place] = []
    strides: list[Shape | None] = []
    for cell, start, size, steps in header.cells():
        file = files.get(cell)
        if file is None:
            raise ExportError(f"{key}: cell {cell} is missing")
        if file.size != header.cell_bytes:
            raise ExportError(f"{key}: cell {cell} has {file.size} bytes, expected {header.cell_bytes}")
        starts.append(start)
        sizes.append(size)
        places.append((builder.file(file.name), file.base, file.size))
        strides.append(steps)
    builder.add_boxes(name, header.shape, header.dtype, starts=starts, sizes=sizes, places=places, strides=strides)
