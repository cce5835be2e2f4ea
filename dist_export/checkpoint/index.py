"""The chunk table: which bytes of which files hold which boxes of which tensors.

Every checkpoint format is reduced to a `CheckpointIndex`; nothing above this layer knows a format.
The table is columnar: a checkpoint of a large mixture of experts has hundreds of thousands of chunks,
and as arrays they cost bytes each, not kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_export.errors import ExportError, Faults
from dist_export.tensors.boxes import Box, Shape, partition_faults

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a global tensor and where its bytes lie."""

    box: Box
    file: int
    """Number of the file in `CheckpointIndex.files`."""
    offset: int  # bytes from the start of the file
    length: int  # bytes
    strides: Shape | None = None
    """Bytes between neighbours per dim when `offset` is the first element; None: row-major, or a record
    (a whole ``torch.save`` zip) whose head says it (`CheckpointIndex.chunks_are_records`)."""


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """A pickled object of the checkpoint: its bytes, never loaded without need."""

    file: int
    offset: int  # bytes
    length: int  # bytes


@dataclass(frozen=True, slots=True)
class Ignored:
    """Contents left out of the table on purpose."""

    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A global tensor of the checkpoint."""

    shape: Shape
    dtype: str
    num_chunks: int


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All model tensors of a checkpoint. Made by a format module, read-only afterwards."""

    folder: Path
    """Where `files` are."""
    format: str
    files: tuple[str, ...]
    chunks_are_records: bool
    tensors: Mapping[str, TensorInfo]
    """Global name, without ``model.``/``module.`` prefixes -> shape and dtype."""
    objects: Mapping[str, ObjectRecord]
    ignored: Mapping[str, Ignored]
    """Reason -> what was left out for it."""
    _first: Mapping[str, tuple[int, int]]
    """Global name -> (its first chunk, its first row in `_boxes`)."""
    _boxes: Int64  # [sum over chunks of ndim, 2]: start and size
    _places: Int64  # [num_chunks, 3]: file, offset, length
    _strides: Mapping[int, Shape] = field(default_factory=dict)

    @property
    def num_chunks(self) -> int:
        return len(self._places)

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of chunk storage, container overhead included."""
        return int(self._places[:, 2].sum())

    def path(self, file: int) -> Path:
        """The path of file number `file`."""
        return self.folder / self.files[file]

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """Global name -> (shape, dtype name): what a catalogue is made of."""
        return {name: (info.shape, info.dtype) for name, info in self.tensors.items()}

    def chunks(self, name: str, box: Box | None = None) -> list[Chunk]:
        """The chunks of a tensor that share an element with `box` (all when None)."""
        info = self.tensors[name]
        boxes = self._boxes_of(name)
        rows = range(info.num_chunks) if box is None else _touching(boxes, box)
        first = self._first[name][0]
        return [self._chunk(first + row, boxes[row]) for row in rows]

    def _boxes_of(self, name: str) -> Int64:
        """[num_chunks, ndim, 2]"""
        info, first = self.tensors[name], self._first[name][1]
        ndim = len(info.shape)
        return self._boxes[first : first + info.num_chunks * ndim].reshape(info.num_chunks, ndim, 2)

    def _chunk(self, number: int, bounds: Int64) -> Chunk:
        file, offset, length = (int(value) for value in self._places[number])
        box = Box(tuple(bounds[:, 0].tolist()), tuple(bounds[:, 1].tolist()))
        return Chunk(box, file, offset, length, self._strides.get(number))


def _touching(boxes: Int64, box: Box) -> list[int]:
    start, size = np.array(box.start, np.int64), np.array(box.size, np.int64)
    below = boxes[:, :, 0] < start + size
    above = boxes[:, :, 0] + boxes[:, :, 1] > start
    return [int(row) for row in np.nonzero((below & above).all(axis=1))[0]]


class IndexBuilder:
    """Collects tensors and chunks for a `CheckpointIndex` and checks that the chunks tile each tensor."""

    def __init__(self, folder: Path, format_name: str, *, chunks_are_records: bool) -> None:
        self.folder, self.format, self.chunks_are_records = folder, format_name, chunks_are_records
        self.objects: dict[str, ObjectRecord] = {}
        self.faults = Faults(f"{folder}: chunks do not make whole tensors")
        self._files: dict[str, int] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._first: dict[str, tuple[int, int]] = {}
        self._boxes: list[Int64] = []
        self._places: list[tuple[int, int, int]] = []
        self._strides: dict[int, Shape] = {}
        self._ignored: dict[str, list[int]] = {}
        self._num_box_rows = 0

    def file(self, name: str) -> int:
        """The number of a file, which is registered on first use."""
        return self._files.setdefault(name, len(self._files))

    def ignore(self, reason: str, *, num_bytes: int) -> None:
        """Count a tensor that is left out on purpose."""
        counts = self._ignored.setdefault(reason, [0, 0])
        counts[0] += 1
        counts[1] += num_bytes

    def add(self, name: str, shape: Shape, dtype: str, chunks: Sequence[Chunk]) -> None:
        """Add a tensor. Chunks with equal boxes are replicas: the first is kept."""
        if name in self._tensors:
            self.faults.add(f"{name} is there twice, with and without a model. or module. prefix")
            return
        chunks = list({(c.box.start, c.box.size): c for c in reversed(chunks)}.values())[::-1]
        self.faults.extend(f"{name}: {fault}" for fault in tiling_faults([c.box for c in chunks], shape)[:1])
        self._tensors[name] = TensorInfo(shape, dtype, len(chunks))
        self._first[name] = (len(self._places), self._num_box_rows)
        for chunk in chunks:
            if chunk.strides is not None:
                self._strides[len(self._places)] = chunk.strides
            self._places.append((chunk.file, chunk.offset, chunk.length))
        bounds = np.array([(c.box.start, c.box.size) for c in chunks], np.int64).reshape(len(chunks), 2, len(shape))
        self._boxes.append(bounds.transpose(0, 2, 1).reshape(-1, 2))
        self._num_box_rows += len(chunks) * len(shape)

    def build(self) -> CheckpointIndex:
        """The finished table; `ExportError` with every fault found while adding."""
        self.faults.raise_if_any()
        if not self._tensors:
            raise ExportError(f"{self.folder}: holds no model tensors")
        return CheckpointIndex(
            folder=self.folder,
            format=self.format,
            files=tuple(self._files),
            chunks_are_records=self.chunks_are_records,
            tensors=self._tensors,
            objects=self.objects,
            ignored={reason: Ignored(*counts) for reason, counts in self._ignored.items()},
            _first=self._first,
            _boxes=np.concatenate(self._boxes) if self._boxes else np.zeros((0, 2), np.int64),
            _places=np.array(self._places, np.int64).reshape(-1, 3),
            _strides=self._strides,
        )


def tiling_faults(boxes: Sequence[Box], shape: Shape) -> list[str]:
    """Why `boxes` do not tile `shape`; empty when they do.

    A grid (every box spans from one cut to the next in every dim) is recognised in linear time; anything
    else is swept exactly.
    """
    return [] if _is_grid(boxes, shape) else partition_faults(boxes, shape)


def _is_grid(boxes: Sequence[Box], shape: Shape) -> bool:
    if len({box.start for box in boxes}) != len(boxes) or not shape:
        return len(boxes) == 1 and boxes[0].size == shape
    cuts = [sorted({box.start[dim] for box in boxes}) for dim in range(len(shape))]
    if math.prod(map(len, cuts)) != len(boxes) or any(cut[0] != 0 for cut in cuts):
        return False
    following = [dict(zip(cut, (*cut[1:], size), strict=True)) for cut, size in zip(cuts, shape, strict=True)]
    return all(
        a + n == following[dim][a] and n > 0
        for box in boxes
        for dim, (a, n) in enumerate(zip(box.start, box.size, strict=True))
    )


def without_wrapper_prefix(name: str) -> str:
    """A key without the ``model.`` and ``module.`` that wrappers put in front of it."""
    while name.startswith(("model.", "module.")):
        name = name.split(".", 1)[1]
    return name


def readable_files(index: CheckpointIndex) -> Iterator[tuple[int, int]]:
    """(file number, size in bytes) of every file of the table; `ExportError` naming those that are missing."""
    faults = Faults(f"{index.folder}: files named by the checkpoint's metadata cannot be read")
    for number in range(len(index.files)):
        try:
            yield number, index.path(number).stat().st_size
        except OSError as error:
            faults.add(f"{index.files[number]}: {error.strerror}")
    faults.raise_if_any()


def check_extents(index: CheckpointIndex, sizes: Iterable[tuple[int, int]]) -> None:
    """Every chunk must end inside its file; `ExportError` names files that were cut short."""
    size_of = dict(sizes)
    ends = np.zeros(len(index.files), np.int64)
    np.maximum.at(ends, index._places[:, 0], index._places[:, 1] + index._places[:, 2])
    faults = Faults(f"{index.folder}: files are shorter than the checkpoint's metadata says")
    for number, end in enumerate(ends.tolist()):
        if end > size_of[number]:
            faults.add(f"{index.files[number]}: has {size_of[number]} bytes, needs {end}; the file is truncated")
    faults.raise_if_any()
