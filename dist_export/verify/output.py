"""An export on disk as its plan describes it: where every tensor lies, and reading parts of it.

A plan's tensors are addressed by `TensorId`; for the inverse rules, which speak of views, each is a `Slab`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.plan.export import ExportPlan
from dist_export.plan.shard import PlannedTensor
from dist_export.plan.work import OutputTensor
from dist_export.tensors.boxes import Shape
from dist_export.tensors.views import Slab, View

Block = npt.NDArray[Any]
"""[rows, columns] of raw elements, as unsigned integers of the element's size."""

TensorId = tuple[int, int]
"""(number of the file in its plan, number of the tensor in its file)."""


class PlannedOutput:
    """The tensors of a plan by target rank and name. Pure: touches no file."""

    def __init__(self, plan: ExportPlan) -> None:
        self.plan = plan
        self.file_names = {number: shard.file_name for number, shard in plan.shards().items()}
        self.tensors: dict[TensorId, OutputTensor] = {}
        self._by_rank: dict[tuple[int, str], TensorId] = {}
        one_rank = plan.planner.layout.world_size == 1
        for number, shard in plan.shards().items():
            data_start = len(shard.header)
            for index, planned in enumerate(shard.tensors):
                self.tensors[number, index] = OutputTensor(number, index, planned, data_start)
                name = planned.name.removesuffix("_packed")  # codes under a name of their own
                self._by_rank[0 if one_rank else number, name] = (number, index)

    def find(self, rank: int, name: str) -> OutputTensor | None:
        """The tensor that target `rank` calls `name`; None when the plan has none."""
        key = self._by_rank.get((rank, name))
        return self.tensors[key] if key is not None else None

    def where(self, key: TensorId) -> str:
        """``rank0.safetensors: lm_head.weight``."""
        return f"{self.file_names[key[0]]}: {self.tensors[key].planned.name}"

    @staticmethod
    def view(tensor: OutputTensor, *prefix: int) -> View:
        """All of a target tensor, or of its part at leading indices `prefix` (one of its stacked experts).

        In the orientation of the rules, before a transposition.
        """
        return View.of(Slab("", (tensor.file, tensor.index, *prefix)), tensor.planned.view.shape[len(prefix) :])

    def of_slab(self, slab: Slab) -> tuple[OutputTensor, Shape]:
        """The tensor behind a slab of `view`, and its leading indices."""
        file, index, *prefix = slab.prefix
        return self.tensors[file, index], tuple(prefix)


class Region(Struct, frozen=True):
    """Rows and columns of a target tensor, in the orientation of the rules; ends are exclusive."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


class OutputReader:
    """Reads an export's files. `read_at` and `read` may be called from several threads."""

    def __init__(self, folder: Path, file_names: Mapping[int, str]) -> None:
        self.folder, self.file_names = folder, file_names
        self._descriptors: dict[int, int] = {}
        for number, name in file_names.items():
            try:
                self._descriptors[number] = os.open(folder / name, os.O_RDONLY)
            except OSError as error:
                self.close()
                raise ExportError(f"{folder / name}: {error.strerror}") from error

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> OutputReader:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def read_at(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`; `ExportError` naming the file when it cannot be read so far."""
        path, done = self.folder / self.file_names[file], 0
        while done < buffer.nbytes:
            try:
                count = os.preadv(self._descriptors[file], [buffer[done:]], offset + done)
            except OSError as error:
                raise ExportError(f"{path}: cannot read at {offset + done}: {error.strerror}") from error
            if count == 0:
                raise ExportError(f"{path}: ends at byte {offset + done}; it was changed while it was verified")
            done += count

    def read(self, tensor: OutputTensor, region: Region) -> Block:
        """The elements of `region` [rows, columns]. One read call per run of bytes that is contiguous in the file."""
        planned = tensor.planned
        if planned.is_permuted:
            return self._read_permuted(tensor, region)
        if planned.transposed:
            height = planned.view.shape[0]
            stored = self.read_matrix(tensor, height, Region(region.columns, region.rows))
            turned: Block = stored.T
            return turned
        return self.read_matrix(tensor, planned.shape[-1] if planned.shape else 1, region)

    def _read_permuted(self, tensor: OutputTensor, region: Region) -> Block:
        """`region` of a tensor whose slices are transposed or have alternating halves."""
        planned, itemsize = tensor.planned, tensor.planned.dtype.itemsize
        shape = planned.view.shape
        out = shape[1]
        block: Block = np.empty(region.shape, f"u{itemsize}")
        if not planned.transposed:  # [slices, out]
            for first, end, stored, step in _halves(region.columns, out, planned.interleaved):
                part = self.read_matrix(tensor, out, Region(region.rows, stored))
                block[:, first - region.columns[0] : end - region.columns[0]] = part[:, ::step]
            return block
        for number in range(region.rows[0] // out, -(-region.rows[1] // out)):
            top = number * out - region.rows[0]
            rows = max(-top, 0), min(region.rows[1] - number * out, out)
            lines = number * shape[2] + region.columns[0], number * shape[2] + region.columns[1]
            for first, end, stored, step in _halves(rows, out, planned.interleaved):
                part = self.read_matrix(tensor, out, Region(lines, stored))
                block[top + first : top + end] = part[:, ::step].T
        return block

    def read_matrix(self, tensor: OutputTensor, width: int, region: Region) -> Block:
        """`region` of a tensor as it is stored, taken as a matrix of `width` columns."""
        itemsize = tensor.planned.dtype.itemsize
        block: Block = np.empty(region.shape, f"u{itemsize}")
        for first, rows in _runs(region, width):
            start = tensor.offset + ((region.rows[0] + first) * width + region.columns[0]) * itemsize
            self.read_at(tensor.file, start, block[first : first + rows].data.cast("B"))
        return block


def _halves(
    span: tuple[int, int], size: int, interleaved: bool
) -> Iterator[tuple[int, int, tuple[int, int], int]]:
    """(first, end, span as stored, step in it) of the parts of a span of `size` elements whose halves may alternate."""
    if not interleaved:
        yield *span, span, 1
        return
    half = size // 2
    for number in (0, 1):
        first, end = max(span[0], number * half), min(span[1], (number + 1) * half)
        if first < end:
            start = 2 * (first - number * half) + number
            yield first, end, (start, start + 2 * (end - first) - 1), 2


def _runs(region: Region, width: int) -> Iterator[tuple[int, int]]:
    """(first row within the region, number of rows) of what is contiguous in the file."""
    num_rows, num_columns = region.shape
    if not num_rows or not num_columns:
        return
    if num_columns == width:
        yield 0, num_rows
        return
    yield from ((row, 1) for row in range(num_rows))


def region_of(planned: PlannedTensor) -> Region:
    """All of a planned tensor, as rows and columns."""
    shape = planned.view.shape or (1,)
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    return Region((0, rows), (0, shape[-1]))
