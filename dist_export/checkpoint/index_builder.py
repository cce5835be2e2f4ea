"""Makes a `CheckpointIndex`: collects tensors and chunks, and checks that the chunks tile each tensor."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_export.checkpoint.index import CheckpointIndex, Chunk, Columns, Ignored, ObjectRecord, make_header
from dist_export.errors import ExportError, Faults
from dist_export.tensors.boxes import Box, Shape, partition_faults

Place = tuple[int, int, int]
"""(file number, offset, length)."""
_MANY = 64  # chunks from which arrays are faster than loops
_LARGEST = 1 << 62
"""Sizes, offsets and lengths must be below, so that sums stay within 64 bits."""


class IndexBuilder:
    """Collects tensors and chunks of one checkpoint; used by every format module."""

    def __init__(self, folder: Path, format_name: str, *, chunks_are_records: bool) -> None:
        self.folder, self.format, self.chunks_are_records = folder, format_name, chunks_are_records
        self.objects: dict[str, ObjectRecord] = {}
        self.faults = Faults(f"{folder}: chunks do not make whole tensors")
        self._files: dict[str, int] = {}
        self._dtypes: dict[str, int] = {}
        self._seen: set[str] = set()
        self._rows: dict[str, tuple[int, int, int, int]] = {}  # name -> dtype, dims, chunks, reach
        self._shapes, self._boxes, self._places = array("q"), array("q"), array("q")
        self._stride_chunks, self._strides = array("q"), array("q")
        self._ignored: dict[str, list[int]] = {}

    def file(self, name: str) -> int:
        """The number of a file, which is registered on first use."""
        return self._files.setdefault(name, len(self._files))

    def ignore(self, reason: str, *, num_bytes: int, num_tensors: int = 1) -> None:
        """Count a tensor (or several) that is left out on purpose."""
        counts = self._ignored.setdefault(reason, [0, 0])
        counts[0] += num_tensors
        counts[1] += num_bytes

    def add(self, name: str, shape: Shape, dtype: str, chunks: Sequence[Chunk]) -> None:
        """Add a tensor. Chunks with equal boxes are replicas: the first is kept."""
        self.add_boxes(
            name,
            shape,
            dtype,
            starts=[chunk.box.start for chunk in chunks],
            sizes=[chunk.box.size for chunk in chunks],
            places=[(chunk.file, chunk.offset, chunk.length) for chunk in chunks],
            strides=[chunk.strides for chunk in chunks],
        )

    def add_boxes(
        self,
        name: str,
        shape: Shape,
        dtype: str,
        *,
        starts: Sequence[Shape],
        sizes: Sequence[Shape],
        places: Sequence[Place],
        strides: Sequence[Shape | None] | None = None,
    ) -> None:
        """Add a tensor whose chunks are columns of equal length: without an object per chunk."""
        if name in self._seen:
            self.faults.add(f"{name} is there twice, with and without a model. or module. prefix")
            return
        self._seen.add(name)
        if max(shape, default=0) >= _LARGEST or any(max(place) >= _LARGEST for place in places):
            self.faults.add(f"{name}: a size or an offset is beyond 2**62")
            return
        order = _order(starts, sizes)
        faults = _tiling_faults([starts[i] for i in order], [sizes[i] for i in order], shape)
        if faults:
            self.faults.add(f"{name}: {faults[0]}")
            return
        reach = max((sizes[i][0] for i in order), default=0) if shape else 0
        self._rows[name] = (self._dtypes.setdefault(dtype, len(self._dtypes)), len(shape), len(order), reach)
        self._shapes.extend(shape)
        if strides is not None:
            self._add_strides([strides[i] for i in order])
        self._places.extend(chain.from_iterable(places[i] for i in order))
        for i in order:
            self._boxes.extend(chain.from_iterable(zip(starts[i], sizes[i], strict=True)))

    def build(self) -> CheckpointIndex:
        """The finished table; `ExportError` with every fault found while adding."""
        self.faults.raise_if_any()
        if not self._rows:
            raise ExportError(f"{self.folder}: holds no model tensors")
        header = make_header(
            self.folder,
            format_name=self.format,
            files=self._files,
            chunks_are_records=self.chunks_are_records,
            dtype_names=self._dtypes,
            objects=self.objects,
            ignored={reason: Ignored(*counts) for reason, counts in self._ignored.items()},
        )
        names = [name.encode("utf-8", "surrogatepass") for name in self._rows]
        rows = np.array(list(self._rows.values()), np.int64)
        columns = Columns(
            name_bytes=np.frombuffer(b"".join(names), np.uint8),
            name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
            dtypes=rows[:, 0].copy(),
            num_dims=rows[:, 1].copy(),
            num_chunks=rows[:, 2].copy(),
            reach=rows[:, 3].copy(),
            shapes=_int64(self._shapes),
            boxes=_int64(self._boxes),
            places=_int64(self._places),
            stride_chunks=_int64(self._stride_chunks),
            strides=_int64(self._strides),
        )
        return CheckpointIndex(header, columns)

    def _add_strides(self, strides: Sequence[Shape | None]) -> None:
        first = len(self._places) // 3
        for number, steps in enumerate(strides):
            if steps is not None:
                self._stride_chunks.append(first + number)
                self._strides.extend(steps)


def _int64(values: array[int]) -> npt.NDArray[np.int64]:
    return np.frombuffer(values, np.int64) if values else np.zeros(0, np.int64)


def _order(starts: Sequence[Shape], sizes: Sequence[Shape]) -> list[int]:
    """Chunk numbers in order of their starts; of chunks with equal boxes only the first."""
    if len(starts) == 1:
        return [0]
    first: dict[tuple[Shape, Shape], int] = {}
    for number, box in enumerate(zip(starts, sizes, strict=True)):
        first.setdefault(box, number)
    return [number for _, number in sorted(first.items())]


def _tiling_faults(starts: Sequence[Shape], sizes: Sequence[Shape], shape: Shape) -> list[str]:
    if _is_grid(starts, sizes, shape):
        return []
    wrong = next((box for box in chain(starts, sizes) if len(box) != len(shape)), None)
    if wrong is not None:
        return [f"a chunk has {len(wrong)} dims, expected those of the shape {list(shape)}"]
    return partition_faults([Box(start, size) for start, size in zip(starts, sizes, strict=True)], shape)


def tiling_faults(boxes: Sequence[Box], shape: Shape) -> list[str]:
    """Why `boxes` do not tile `shape`; empty when they do.

    A grid (every box spans from one cut to the next in every dim) is recognised in linear time; anything
    else is swept exactly.
    """
    return _tiling_faults([box.start for box in boxes], [box.size for box in boxes], shape)


def _is_grid(starts: Sequence[Shape], sizes: Sequence[Shape], shape: Shape) -> bool:
    if len(starts) == 1 or not shape:
        return len(starts) == 1 and tuple(sizes[0]) == shape and not any(starts[0])
    if not starts or any(len(box) != len(shape) for box in chain(starts, sizes)):
        return False
    if len(starts) >= _MANY:
        return _is_large_grid(starts, sizes, shape)
    cuts = [sorted({start[dim] for start in starts}) for dim in range(len(shape))]
    if math.prod(map(len, cuts)) != len(set(starts)) or len(set(starts)) != len(starts):
        return False
    if any(cut[0] != 0 for cut in cuts):
        return False
    following = [dict(zip(cut, (*cut[1:], size), strict=True)) for cut, size in zip(cuts, shape, strict=True)]
    return all(
        a + n == following[dim][a] and n > 0
        for start, size in zip(starts, sizes, strict=True)
        for dim, (a, n) in enumerate(zip(start, size, strict=True))
    )


def _is_large_grid(starts: Sequence[Shape], sizes: Sequence[Shape], shape: Shape) -> bool:
    """The same with arrays."""
    try:
        start, size = np.array(starts, np.int64), np.array(sizes, np.int64)
    except OverflowError:
        return False
    cells, number = 1, np.zeros(len(start), np.int64)
    for dim, limit in enumerate(shape):
        cuts, position = np.unique(start[:, dim], return_inverse=True)  # alone, it would import numpy.ma
        following = np.append(cuts[1:], limit)
        if cuts[0] != 0 or not np.array_equal(following[position] - start[:, dim], size[:, dim]):
            return False
        if size[:, dim].min() < 1:
            return False
        cells *= len(cuts)
        if cells > len(start):
            return False
        number = number * len(cuts) + position
    seen = np.zeros(cells, bool)
    seen[number] = True
    return cells == len(start) and bool(seen.all())
