"""The chunk table: which bytes of which files hold which boxes of which tensors.

Every checkpoint format is reduced to a `CheckpointIndex`; nothing above this layer knows a format.
The table is columnar: a checkpoint of a large mixture of experts has hundreds of thousands of chunks,
and as arrays they cost bytes each, not kilobytes. As one buffer (`CheckpointIndex.to_bytes`) the
processes of a node map it instead of parsing the checkpoint each.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import asdict, replace

from dist_export.checkpoint.array_format import Array, Buffer, pack, unpack
from dist_export.errors import ExportError, Faults
from dist_export.tensors.boxes import Box, Shape

Int64 = npt.NDArray[np.int64]


class Chunk(Struct, frozen=True):
    """A box of a global tensor and where its bytes lie."""

    box: Box
    file: int
    """Number of the file in `CheckpointIndex.files`."""
    offset: int  # bytes from the start of the file
    length: int  # bytes
    strides: Shape | None = None
    """Bytes between neighbours per dim when `offset` is the first element; None: row-major, or a record
    (a whole ``torch.save`` zip) whose head says it (`CheckpointIndex.chunks_are_records`)."""


class ObjectRecord(Struct, frozen=True):
    """A pickled object of the checkpoint: its bytes, never loaded without need."""

    file: int
    offset: int  # bytes
    length: int  # bytes


class Ignored(Struct, frozen=True):
    """Contents left out of the table on purpose."""

    num_tensors: int
    num_bytes: int


class TensorInfo(Struct, frozen=True):
    """A global tensor of the checkpoint."""

    shape: Shape
    dtype: str
    num_chunks: int


class Columns(Struct, frozen=True, eq=False):
    """The arrays of a table: one row per tensor, per box bound, per chunk. Tensors keep their chunks together."""

    name_bytes: npt.NDArray[np.uint8]
    """All names in UTF-8, one after the other."""
    name_ends: Int64  # [num_tensors]: in name_bytes
    dtypes: Int64  # [num_tensors]: number in `dtype_names` of the header
    num_dims: Int64  # [num_tensors]
    num_chunks: Int64  # [num_tensors]
    reach: Int64  # [num_tensors]: largest size of a chunk along dim 0
    shapes: Int64  # [sum of num_dims]
    boxes: Int64  # [sum of num_chunks x num_dims x 2]: start and size; chunks in order of their starts
    places: Int64  # [sum of num_chunks x 3]: file, offset, length
    stride_chunks: Int64  # [chunks with strides]: their numbers, ascending
    strides: Int64  # [sum of their num_dims]: bytes

    def arrays(self) -> dict[str, Array]:
        """The columns by name."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


class TensorTable(Mapping[str, TensorInfo]):
    """Global name -> `TensorInfo`, made when asked for."""

    def __init__(self, columns: Columns, dtype_names: tuple[str, ...]) -> None:
        self._columns, self._dtype_names = columns, dtype_names
        ends = columns.name_ends.tolist()
        text, starts = columns.name_bytes.tobytes(), [0, *ends[:-1]]
        names = (text[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True))
        self._rows = {name: row for row, name in enumerate(names)}
        self._shape_starts = _starts(columns.num_dims)

    def __getitem__(self, name: str) -> TensorInfo:
        row = self._rows[name]
        shape = tuple(self._columns.shapes[self._shape_starts[row] : self._shape_starts[row + 1]].tolist())
        return TensorInfo(shape, self._dtype_names[self._columns.dtypes[row]], int(self._columns.num_chunks[row]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def row(self, name: str) -> int:
        """The row of a tensor in the columns."""
        return self._rows[name]

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """Global name -> (shape, dtype name). Equal values are one object: experts are thousands alike."""
        known: dict[tuple[int, ...], tuple[Shape, str]] = {}
        sizes, bounds = self._columns.shapes.tolist(), self._shape_starts.tolist()
        result = {}
        for row, (name, dtype) in enumerate(zip(self._rows, self._columns.dtypes.tolist(), strict=True)):
            shape = tuple(sizes[bounds[row] : bounds[row + 1]])
            key = (dtype, *shape)
            result[name] = known.setdefault(key, (shape, self._dtype_names[dtype]))
        return result


FEW_CHUNKS = 4
"""Boxes that are compared sooner in Python than with arrays."""
MANY_CHUNKS = 64
"""Of one tensor, from which on looking at all of them costs more than finding the few that matter."""


class CheckpointIndex:
    """All model tensors of a checkpoint. Made by an `IndexBuilder` or from a buffer; read-only."""

    def __init__(self, header: Mapping[str, Any], columns: Columns) -> None:
        self._header, self._columns = header, columns
        self.folder = Path(header["folder"])
        """Where `files` are."""
        self.format = str(header["format"])
        self.files: tuple[str, ...] = tuple(header["files"])
        self.chunks_are_records = bool(header["chunks_are_records"])
        self.tensors = TensorTable(columns, tuple(header["dtype_names"]))
        """Global name, without ``model.``/``module.`` prefixes -> shape and dtype."""
        self.objects: Mapping[str, ObjectRecord] = {
            name: ObjectRecord(*place) for name, place in header["objects"].items()
        }
        self.ignored: Mapping[str, Ignored] = {reason: Ignored(*what) for reason, what in header["ignored"].items()}
        """Reason -> what was left out for it."""
        self._places = columns.places.reshape(-1, 3)
        self._first_chunks = _starts(columns.num_chunks)
        self._first_bounds = _starts(columns.num_chunks * columns.num_dims)
        self._strides = _strides_of(columns)
        self._led: dict[int, tuple[int, dict[Shape, list[int]]]] = {}

    @property
    def origin(self) -> Path:
        """What the user named: `folder`, except where that is a temporary copy."""
        return Path(self._header.get("origin", self.folder))

    @property
    def num_chunks(self) -> int:
        return len(self._places)

    @property
    def parts(self) -> tuple[Mapping[str, Any], Columns]:
        """Header and arrays, to make another table of."""
        return self._header, self._columns

    @property
    def adapters(self) -> Mapping[str, Any] | None:
        """``folder`` and ``iteration`` of the checkpoint that the adapters in the table are from, when not this one."""
        return self._header.get("adapters")

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of chunk storage, container overhead included."""
        return int(self._places[:, 2].sum())

    def path(self, file: int) -> Path:
        """The path of file number `file`."""
        return self.folder / self.files[file]

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """Global name -> (shape, dtype name): what a catalogue is made of."""
        return self.tensors.shapes()

    def chunks(self, name: str, box: Box | None = None) -> list[Chunk]:
        """The chunks of a tensor that share an element with `box` (all when None), in order of their starts."""
        row = self.tensors.row(name)
        boxes, first = self._boxes_of(row), int(self._first_chunks[row])
        if box is None:
            return [self._chunk(first + number, boxes[number]) for number in range(len(boxes))]
        return [self._chunk(first + number, boxes[number]) for number in self._touching(row, boxes, box)]

    def _touching(self, row: int, boxes: Int64, box: Box) -> list[int]:
        """Numbers of a tensor's chunks that share an element with `box`."""
        if len(boxes) >= MANY_CHUNKS:
            depth, led = self._leading(row, boxes)
            if depth and box.size[:depth] == (1,) * depth:
                near = led.get(box.start[:depth], [])
                return [near[number] for number in _touching(boxes[near], box)] if near else []
        low, high = self._candidates(row, boxes, box)
        return [low + number for number in _touching(boxes[low:high], box)]

    def _leading(self, row: int, boxes: Int64) -> tuple[int, dict[Shape, list[int]]]:
        """(number of leading dims along which every chunk is one element, chunks by their place there): of stacked
        layers and experts, each of which is asked for by itself."""
        if row not in self._led:
            depth = 0
            while depth < min(2, boxes.shape[1]) and (boxes[:, depth, 1] == 1).all():
                depth += 1
            led: dict[Shape, list[int]] = {}
            for number, start in enumerate(boxes[:, :depth, 0].tolist() if depth else ()):
                led.setdefault(tuple(start), []).append(number)
            self._led[row] = depth, led
        return self._led[row]

    def first_place(self, name: str, box: Box) -> tuple[int, int]:
        """(file, offset) of the first chunk that shares an element with `box`: an order to read in."""
        chunks = self.chunks(name, box)
        return (chunks[0].file, chunks[0].offset) if chunks else (0, 0)

    def to_bytes(self) -> bytes:
        """The whole table as one buffer, for `from_buffer` in another process."""
        return pack(self._header, self._columns.arrays())

    @classmethod
    def from_buffer(cls, buffer: Buffer, *, origin: str = "shared index") -> CheckpointIndex:
        """The table in `buffer`, of which no part is copied. `ExportError` when it is not a whole table."""
        header, arrays = unpack(buffer, origin=origin)
        missing = set(Columns.__struct_fields__) - arrays.keys()
        if missing or _inconsistent(header, arrays):
            raise ExportError(f"{origin}: not a chunk table, or one that was damaged")
        return cls(header, Columns(**{name: arrays[name] for name in Columns.__struct_fields__}))  # type: ignore[arg-type]

    def relabelled(self, format_name: str) -> CheckpointIndex:
        """The same table as one of another format: of the container that the weights are in."""
        return CheckpointIndex({**self._header, "format": format_name}, self._columns)

    def copied_from(self, origin: Path) -> CheckpointIndex:
        """The same table when its `folder` is a temporary copy of `origin`."""
        return CheckpointIndex({**self._header, "origin": os.fspath(origin)}, self._columns)

    def moved_into(self, path: Path, bases: Mapping[str, int], *, format_name: str) -> CheckpointIndex:
        """The table when every file lies, whole, inside of the one file `path`, from byte ``bases[name]`` on."""
        shift = np.array([bases[name] for name in self.files], np.int64)
        places = self._places.copy()
        places[:, 1] += shift[places[:, 0]]
        places[:, 0] = 0
        objects = {n: [0, r.offset + bases[self.files[r.file]], r.length] for n, r in self.objects.items()}
        header = {**self._header, "folder": os.fspath(path), "files": ["."], "objects": objects, "format": format_name}
        return CheckpointIndex(header, replace(self._columns, places=places.reshape(-1)))

    def _boxes_of(self, row: int) -> Int64:
        """[num_chunks, ndim, 2]"""
        first, end = 2 * self._first_bounds[row], 2 * self._first_bounds[row + 1]
        shape = (int(self._columns.num_chunks[row]), int(self._columns.num_dims[row]), 2)
        return self._columns.boxes[first:end].reshape(shape)

    def _candidates(self, row: int, boxes: Int64, box: Box) -> tuple[int, int]:
        """The chunks, in order of their starts, of which none before or behind can touch `box` along dim 0."""
        if not box.start or len(boxes) < MANY_CHUNKS:
            return 0, len(boxes)
        lowest = box.start[0] - int(self._columns.reach[row]) + 1
        low = bisect_left(range(len(boxes)), lowest, key=lambda i: int(boxes[i, 0, 0]))
        end = box.start[0] + box.size[0]
        return low, bisect_left(range(len(boxes)), end, lo=low, key=lambda i: int(boxes[i, 0, 0]))

    def _chunk(self, number: int, bounds: Int64) -> Chunk:
        file, offset, length = self._places[number].tolist()
        start, size = bounds.T.tolist() if bounds.size else ((), ())
        return Chunk(Box(tuple(start), tuple(size)), file, offset, length, self._strides.get(number))


def make_header(
    folder: Path,
    *,
    format_name: str,
    files: Iterable[str],
    chunks_are_records: bool,
    dtype_names: Iterable[str],
    objects: Mapping[str, ObjectRecord],
    ignored: Mapping[str, Ignored],
) -> dict[str, object]:
    """The part of a table that is no array, as JSON values."""
    return {
        "folder": os.fspath(folder),
        "format": format_name,
        "files": list(files),
        "chunks_are_records": chunks_are_records,
        "dtype_names": list(dtype_names),
        "objects": {name: list(asdict(place).values()) for name, place in objects.items()},
        "ignored": {reason: list(asdict(what).values()) for reason, what in ignored.items()},
    }


def _starts(counts: Int64) -> Int64:
    """[len + 1]: where each of consecutive runs of `counts` begins, and the end of the last."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))


def _strides_of(columns: Columns) -> dict[int, Shape]:
    """Chunk number -> its strides."""
    if not columns.stride_chunks.size:
        return {}
    dims = np.repeat(columns.num_dims, columns.num_chunks)[columns.stride_chunks]
    ends = np.cumsum(dims).tolist()
    values, chunks = columns.strides.tolist(), columns.stride_chunks.tolist()
    return {c: tuple(values[end - n : end]) for c, n, end in zip(chunks, dims.tolist(), ends, strict=True)}


def _inconsistent(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> bool:
    """Whether the arrays of a buffer do not belong together. Their contents were checked when they were made."""
    dims, chunks, places = arrays["num_dims"], arrays["num_chunks"], arrays["places"]
    num_tensors = len(arrays["name_ends"])
    return (
        any(len(arrays[name]) != num_tensors for name in ("dtypes", "num_dims", "num_chunks", "reach"))
        or int(dims.sum()) != len(arrays["shapes"])
        or 2 * int((dims * chunks).sum()) != len(arrays["boxes"])
        or 3 * int(chunks.sum()) != len(places)
        or not {"folder", "format", "files", "chunks_are_records", "dtype_names", "objects", "ignored"} <= header.keys()
        or (len(places) > 0 and int(places[::3].max()) >= len(header["files"]))
    )


def _touching(boxes: Int64, box: Box) -> list[int]:
    if len(boxes) <= FEW_CHUNKS:
        return [row for row, bounds in enumerate(boxes.tolist()) if _meets(bounds, box)]
    start, size = np.array(box.start, np.int64), np.array(box.size, np.int64)
    below = boxes[:, :, 0] < start + size
    above = boxes[:, :, 0] + boxes[:, :, 1] > start
    return [int(row) for row in np.nonzero((below & above).all(axis=1))[0]]


def _meets(bounds: Iterable[tuple[int, int]], box: Box) -> bool:
    for (start, size), first, length in zip(bounds, box.start, box.size, strict=True):
        if start >= first + length or first >= start + size:
            return False
    return True


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
