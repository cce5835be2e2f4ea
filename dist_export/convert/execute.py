"""Execution: work items become tiles, tiles are read, cut, converted where needed, and written.

A few threads each take the next tile; reads, writes, checksums and copies release the interpreter lock.
Memory is two buffers per thread, whatever the model's size.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from dist_export.convert.journal import Done, Journal
from dist_export.convert.ledger import Ledger
from dist_export.convert.low_rank import LowRankMerger
from dist_export.convert.outputs import WritableFile
from dist_export.convert.permute import permuted_slices
from dist_export.convert.profile import NO_PROFILE
from dist_export.convert.quality import Key, Qualities
from dist_export.convert.sources import SourceFiles
from dist_export.convert.tile_reads import Block, read_part
from dist_export.convert.tiles import Tile, cut
from dist_export.convert.view_reader import ViewReader
from dist_export.plan.recipes import Stored
from dist_export.plan.shard import PlannedTensor
from dist_export.plan.work import Fill, OutputTensor, Use, WorkItem, flat_shape

MIB = 1 << 20
TILE_BYTES = 1 * MIB  # of source rows per tile: larger ones win nothing (RESULTS.md of the benchmarks)
DEVICE_TILE_BYTES = 8 * MIB  # where a GPU does the arithmetic: a kernel's launch costs as much as a MiB
BUFFERS_PER_THREAD = 2
HOST_COPIES = 6  # arithmetic on the host holds a tile in up to float32, twice
PINNED_COPIES = 9  # three blocks of a thread under way, each with what it becomes, which may be twice as large
DEVICE_COPIES = 3 * 24  # on the device: of the same blocks, with float32 and masks beside them


Pending = AbstractContextManager[npt.NDArray[Any]]
"""Entered, it gives target elements that a device may still be working on; left, their memory may be used again."""


class Converter(Protocol):
    """What executes value operations (`dist_export.convert.torch_arithmetic`)."""

    @property
    def in_flight(self) -> int:
        """How many blocks of a thread may be under way while it begins another."""

    def begin(self, planned: PlannedTensor, block: Block) -> Pending:
        """Target elements of a block of source elements. The block may be overwritten when this returns."""


class TensorEncoder(Protocol):
    """What makes codes and scales (`dist_export.convert.encode`)."""

    @property
    def in_flight(self) -> int:
        """As that of a `Converter`."""

    @property
    def qualities(self) -> Qualities:
        """What the codes are worth."""

    def begin(
        self, planned: PlannedTensor, block: Block, place: tuple[int, int, int, int], *, key: Key
    ) -> Pending:
        """The codes of a block of weights at a place of the weight `key`; as that of a `Converter`."""

    def small(self, planned: PlannedTensor, rows: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """Bytes of some rows of a tensor that is made apart from the weights."""


class Observer(Protocol):
    """Told about progress, and may stop the work by raising."""

    def progress(self, num_bytes_read: int, num_bytes_written: int) -> None:
        """Called after each tile, from any thread."""


class Budget(Struct, frozen=True):
    """How many threads with how large buffers. `host_memory` is in bytes and bounds all buffers together."""

    num_threads: int = 2
    tile_bytes: int = TILE_BYTES

    @classmethod
    def within(cls, host_memory: int, *, num_threads: int, value_ops: bool, device_memory: int | None = None) -> Budget:
        """Tiles of the default size, smaller when `host_memory` does not allow that many, or `device_memory` where
        that is given because a GPU does the arithmetic."""
        copies, most = BUFFERS_PER_THREAD, TILE_BYTES
        if device_memory is not None:
            copies += PINNED_COPIES
            most = min(DEVICE_TILE_BYTES, device_memory // (num_threads * DEVICE_COPIES))
        elif value_ops:
            copies += HOST_COPIES
        return cls(num_threads, max(min(most, host_memory // (num_threads * copies)), 1 << 16))


class _Buffer(Struct):
    """Reusable page-aligned memory that grows when a single row is larger than a tile."""

    memory: mmap.mmap | bytearray = field(default_factory=bytearray)

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self.memory):
            self.memory = mmap.mmap(-1, num_bytes)
        return memoryview(self.memory)[:num_bytes]


class Rectangle2D(Struct, frozen=True):
    """Where a block goes in an output tensor: first row, first column, number of rows and columns."""

    row: int
    column: int
    num_rows: int
    num_columns: int

    def transposed(self) -> Rectangle2D:
        """The same place in the transposed tensor."""
        return Rectangle2D(self.column, self.row, self.num_columns, self.num_rows)

    def runs(self, width: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the tensor, length, offset in the block) of its contiguous runs, in elements."""
        if self.num_columns == width or self.num_rows == 1:
            yield self.row * width + self.column, self.num_rows * self.num_columns, 0
            return
        for line in range(self.num_rows):
            yield (self.row + line) * width + self.column, self.num_columns, line * self.num_columns


class Executor:
    """Does one process's share of a run. Everything it writes is noted in `ledger`."""

    def __init__(
        self, sources: SourceFiles, outputs: Mapping[int, WritableFile], *, budget: Budget, observer: Observer
    ) -> None:
        self.sources, self.outputs, self.budget, self.observer = sources, outputs, budget, observer
        self.merger = LowRankMerger(sources)
        self.ledger = Ledger()
        self.converter: Converter | None = None
        self.encoder: TensorEncoder | None = None
        self.reader: ViewReader | None = None
        self.profile = NO_PROFILE
        self.done = Done({})
        """What an earlier run has written."""
        self.journal: Journal | None = None
        self._lock = Lock()

    def run(self, items: Sequence[WorkItem], fills: Iterable[Fill]) -> None:
        """Do all of the work. The first failure stops every thread and is raised."""
        for fill in fills:
            if fill.output.planned.is_permuted:
                self._write_permuted(fill.output)
            elif fill.output.planned.is_small:
                self._write_small(fill.output)
            else:
                self._write_zeros(fill)
        tiles = self._tiles(items)
        with ThreadPoolExecutor(self.budget.num_threads, "tile") as pool:
            futures = [pool.submit(self._work, tiles) for _ in range(self.budget.num_threads)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop = True  # a thread has failed, or a signal has ended the wait
        for future in futures:
            future.result()

    _stop = False

    def _tiles(self, items: Sequence[WorkItem]) -> Iterator[Tile]:
        for item in items:
            needed = [item.needed(use) for use in item.uses]
            rectangles = self.sources.rectangles(item.slab, item.shape, item.dtype, needed=needed)
            yield from cut(item, rectangles, self.budget.tile_bytes)

    def _work(self, tiles: Iterator[Tile]) -> None:
        read_buffer, block_buffer, flight = _Buffer(), _Buffer(), deque[_Flying]()
        while not self._stop:
            with self._lock:
                tile = next(tiles, None)
            if tile is None:
                self._land(flight, 0)
                return
            if self.done and not self._is_missing(tile):
                continue
            with self.profile.span("read"):
                parts = self._read(tile, read_buffer)
            merged = 0
            if tile.item.update:
                with self.profile.span("merge"):
                    merged = self.merger.merge(tile, parts)
            written = sum(self._write_use(tile, use, parts, block_buffer, flight) for use in tile.uses)
            num_rows = tile.rows[1] - tile.rows[0]
            read = sum(r.num_bytes(num_rows, tile.item.dtype.itemsize) for r in tile.reads)
            self.observer.progress(read + merged, written)

    def done_tiles(self, items: Sequence[WorkItem]) -> Iterator[Tile]:
        """Tiles of which an earlier run has written everything. Before `run`."""
        return (tile for tile in self._tiles(items) if self.done and not self._is_missing(tile))

    def _is_missing(self, tile: Tile) -> bool:
        """Whether some byte that the tile writes is not done."""
        for use in tile.uses:
            size = use.output.planned.dtype.itemsize
            for offset, length, _ in _place(tile, use).runs(_width(use)):
                if self.done.missing(use.output.key, offset * size, length * size):
                    return True
        return False

    def _read(self, tile: Tile, buffer: _Buffer) -> list[tuple[int, Block]]:
        """(first column, block of the tile's rows) per read."""
        num_rows, itemsize = tile.rows[1] - tile.rows[0], tile.item.dtype.itemsize
        sizes = [-(-read.num_bytes(num_rows, itemsize) // 64) * 64 for read in tile.reads]
        memory, start, parts = buffer.take(sum(sizes)), 0, []
        for read, size in zip(tile.reads, sizes, strict=True):
            parts.append((read.columns[0], read_part(tile, read, memory[start : start + size], self.sources.read_into)))
            start += size
        return parts

    def _write_use(
        self, tile: Tile, use: Use, parts: Sequence[tuple[int, Block]], buffer: _Buffer, flight: deque[_Flying]
    ) -> int:
        """Write a use's part of a tile, or send it on its way. Returns its size in bytes."""
        top, bottom, left, right = use.source
        first, end = max(top, tile.rows[0]), min(bottom, tile.rows[1])
        rows = slice(first - tile.rows[0], end - tile.rows[0])
        block = _assembled(parts, rows, (left, right), buffer)
        planned, place = use.output.planned, _place(tile, use)
        if planned.transposed:
            block = np.ascontiguousarray(block.T)
        if planned.moves_only:
            with self.profile.span("copy"):
                data = _packed(block, buffer)
            self._write_runs(use, place, data)
        else:
            arithmetic = self.encoder if planned.recipe is not None else self.converter
            assert arithmetic is not None, f"{planned.name} needs arithmetic"
            with self.profile.span("to device" if arithmetic.in_flight else "compute"):
                pending = self._begin(use, (first - top + use.row, end - top + use.row), block)
            flight.append((use, place, pending))
            self._land(flight, arithmetic.in_flight)
        return place.num_rows * place.num_columns * planned.dtype.itemsize

    def _begin(self, use: Use, rows: tuple[int, int], block: Block) -> Pending:
        """Begin with the arithmetic on a block that lies in `rows` of the tensor."""
        planned = use.output.planned
        if planned.recipe is None:
            assert self.converter is not None, f"{planned.name} needs a converter"
            return self.converter.begin(planned, block)
        assert self.encoder is not None, f"{planned.name} needs an encoder"
        place = (*rows, use.column, use.column + block.shape[1])
        return self.encoder.begin(planned, block, place, key=use.output.key)

    def _land(self, flight: deque[_Flying], num_left: int) -> None:
        """Write what was sent first, until so many are under way."""
        while len(flight) > num_left:
            use, place, pending = flight.popleft()
            with ExitStack() as landed:
                with self.profile.span("from device"):
                    data = landed.enter_context(pending)
                self._write_runs(use, place, memoryview(data.data).cast("B"))

    def _write_runs(self, use: Use, place: Rectangle2D, data: memoryview) -> None:
        size = use.output.planned.dtype.itemsize
        for offset, length, start in place.runs(_width(use)):
            self._write(use.output, offset * size, data[start * size : (start + length) * size])

    def _write(self, output: OutputTensor, offset: int, data: memoryview) -> None:
        """Write the bytes at `offset` of a tensor, but for those that an earlier run has written."""
        if not self.done:
            self._write_new(output, offset, data)
            return
        for first, length in self.done.missing(output.key, offset, data.nbytes):
            self._write_new(output, first, data[first - offset : first - offset + length])

    def _write_new(self, output: OutputTensor, offset: int, data: memoryview) -> None:
        key = output.key
        with self.profile.span("write"):
            self.outputs[output.file].write_at(output.offset + offset, data)
        with self.profile.span("checksum"):
            run = self.ledger.note(key, offset, data)
        if self.journal is not None:
            self.journal.note(key, run)

    def _write_small(self, output: OutputTensor) -> None:
        """A tensor that is made apart from the weights, some rows at a time."""
        planned = output.planned
        assert self.encoder is not None, f"{planned.name} needs an encoder"
        num_rows, width = flat_shape(planned.view.shape)
        step = num_rows if not isinstance(planned.recipe, Stored) else max(MIB // (width * 8), 1)
        for first in range(0, num_rows, step):
            data = self.encoder.small(planned, (first, min(first + step, num_rows)))
            self._write(output, first * width * planned.dtype.itemsize, memoryview(data.data).cast("B"))

    def _write_permuted(self, output: OutputTensor) -> None:
        """A tensor whose slices along the leading dim are put in order, one at a time."""
        planned = output.planned
        assert self.reader is not None, f"{planned.name} needs a reader"
        offset = 0
        for data in permuted_slices(planned, self.reader):
            self._write(output, offset, memoryview(data.data).cast("B"))
            self.observer.progress(data.nbytes, data.nbytes)
            offset += data.nbytes

    def _write_zeros(self, fill: Fill) -> None:
        output, itemsize = fill.output, fill.output.planned.dtype.itemsize
        offset, left = fill.first * itemsize, fill.num_elements * itemsize
        zeros = memoryview(bytes(min(left, MIB)))
        while left:
            part = zeros[: min(left, MIB)]
            self._write(output, offset, part)
            offset, left = offset + part.nbytes, left - part.nbytes


_Flying = tuple[Use, Rectangle2D, Pending]
"""A block under way, and where it goes."""


def _packed(block: Block, buffer: _Buffer) -> memoryview:
    """The bytes of a block without gaps; a view where it has none."""
    if not block.flags.c_contiguous:
        packed = np.ndarray(block.shape, block.dtype, buffer.take(block.nbytes))
        packed[...] = block
        block = packed
    return memoryview(block.data).cast("B")


def _place(tile: Tile, use: Use) -> Rectangle2D:
    """Where the part of a use that a tile makes goes in the output tensor."""
    top, bottom, left, right = use.source
    first, end = max(top, tile.rows[0]), min(bottom, tile.rows[1])
    down, across = use.output.planned.packing
    row, column = (use.row + first - top) // down, use.column // across
    place = Rectangle2D(row, column, (end - first) // down, (right - left) // across)
    return place.transposed() if use.output.planned.transposed else place


def _width(use: Use) -> int:
    """Elements per row of the output tensor as stored."""
    planned = use.output.planned
    return planned.shape[-1] if planned.transposed else use.output.width // planned.packing[1]


def _assembled(
    parts: Sequence[tuple[int, Block]], rows: slice, columns: tuple[int, int], buffer: _Buffer
) -> Block:
    """Rows and columns out of what was read: a view when one part holds them, else joined in `buffer`."""
    left, right = columns
    touching = [(first, block) for first, block in parts if first < right and left < first + block.shape[1]]
    if len(touching) == 1:
        first, block = touching[0]
        return block[rows, left - first : right - first]
    dtype = touching[0][1].dtype
    shape = (rows.stop - rows.start, right - left)
    joined: Block = np.ndarray(shape, dtype, buffer.take(shape[0] * shape[1] * dtype.itemsize))
    for first, block in touching:
        low, high = max(left, first), min(right, first + block.shape[1])
        joined[:, low - left : high - left] = block[rows, low - first : high - first]
    return joined
