"""Comparing checkpoint and output element by element, in bounded memory.

Source rows are read in bands, each once for all its copies in the output; the target's elements are read beside
them. Where the plan computes (norms plus one, casts) the same arithmetic is applied to the source and the bits
compared. Shares nothing with the executor but where the checkpoint's chunks lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from fractions import Fraction
from threading import Lock
from typing import Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from dist_export.convert.execute import Converter
from dist_export.convert.numpy_arithmetic import MOST_BYTES, NumpyArithmetic
from dist_export.convert.sources import SourceFiles, SourceRectangle
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.shard import PlannedTensor
from dist_export.plan.work import SlabUses, Use, flat_shape
from dist_export.tensors.dtypes import DType
from dist_export.tensors.views import Slab
from dist_export.verify.merging import merge_rows
from dist_export.verify.output import Block, OutputReader, Region, TensorId
from dist_export.verify.source_reader import SourceReader

BAND_BYTES = 1 << 20  # of source rows compared at a time


class Difference(Struct, frozen=True):
    """A target tensor that is not what one source tensor makes it."""

    tensor: TensorId
    slab: Slab
    num_different: int
    """Elements that differ."""
    num_compared: int
    source: tuple[int, int]
    """Row and column of the first differing element in the source slab."""
    target: tuple[int, int]
    """Its row and column in the target tensor, in the orientation of the rules."""
    expected: int
    """The element's bits as they should be."""
    found: int

    def merged(self, other: Difference) -> Difference:
        """Both together: the first element is that of whichever comes first in the target."""
        first = min(self, other, key=lambda each: each.target)
        return replace(
            first,
            num_different=self.num_different + other.num_different,
            num_compared=self.num_compared + other.num_compared,
        )


def choose_converter(uses: Iterable[Use], *, device: str = "cpu") -> Converter | None:
    """What does the arithmetic of `uses`; None when they only move bytes. Torch is imported only when it pays."""
    computed = [use for use in uses if not use.output.planned.moves_only]
    if not computed:
        return None
    small = sum(use.num_bytes for use in computed) <= MOST_BYTES
    if small and all(NumpyArithmetic.supports(use.output.planned) for use in computed):
        return NumpyArithmetic()
    from dist_export.convert.torch_arithmetic import TorchArithmetic
    from dist_export.convert.torch_lanes import lanes_on

    return TorchArithmetic(lanes_on(device))


class Recomputer(Protocol):
    """What knows how quantised tensors are made (`dist_export.verify.quantized`)."""

    def expected(self, slab: Slab, use: Use, block: Block, place: tuple[int, int], dtype: DType) -> Block:
        """What the output holds of a block of source elements at (row, column) `place`, as stored."""


class Comparer:
    """Compares source slabs with what an output holds of them."""

    def __init__(
        self,
        sources: SourceFiles,
        output: OutputReader,
        *,
        converter: Converter | None = None,
        recomputer: Recomputer | None = None,
        progress: Callable[[int, int], None] = lambda num_bytes_read, num_bytes_compared: None,
    ) -> None:
        """`progress` is called after each band, from any thread, and may stop the work by raising."""
        self.sources, self.output, self.converter, self.progress = sources, output, converter, progress
        self.reader, self.recomputer = SourceReader(sources), recomputer
        self.num_bytes_compared = 0
        self._lock = Lock()
        self._matrix: tuple[tuple[Slab, tuple[int, int]], Block] | None = None
        self._found: dict[tuple[TensorId, Slab], Difference] = {}
        self._compared: dict[tuple[TensorId, Slab], int] = {}

    def run(self, work: Sequence[SlabUses], *, num_threads: int = 2) -> list[Difference]:
        """All differences, one per target tensor and source slab. The first failure to read is raised."""
        bands = (band for slab in work for band in self._bands(slab))
        if num_threads == 1:
            self._work(bands)
        else:
            with ThreadPoolExecutor(num_threads, "compare") as pool:
                futures = [pool.submit(self._work, bands) for _ in range(num_threads)]
                wait(futures, return_when=FIRST_EXCEPTION)
                self._stop = any(future.done() and future.exception() for future in futures)
            for future in futures:
                future.result()
        return [replace(each, num_compared=self._compared[key]) for key, each in self._found.items()]

    _stop = False

    def equal(self, work: Sequence[SlabUses]) -> bool:
        """Whether everything is equal; stops at the first difference. For trying out what a tensor may hold."""
        for slab in work:
            for band in self._bands(slab):
                self._compare(*band)
                if self._found:
                    return False
        return True

    def _bands(self, slab: SlabUses) -> Iterator[tuple[SlabUses, list[SourceRectangle], tuple[int, int]]]:
        rectangles = self.sources.rectangles(slab.slab, slab.shape, slab.dtype)
        num_rows, width = flat_shape(slab.shape)
        step = max(BAND_BYTES // max(width * slab.dtype.itemsize, 1), 1)
        step += step % 2  # rows may lie in pairs
        for first in range(0, num_rows, step):
            yield slab, rectangles, (first, min(first + step, num_rows))

    def _work(self, bands: Iterator[tuple[SlabUses, list[SourceRectangle], tuple[int, int]]]) -> None:
        while not self._stop:
            with self._lock:
                band = next(bands, None)
            if band is None:
                return
            self._compare(*band)

    def _compare(self, slab: SlabUses, rectangles: Sequence[SourceRectangle], rows: tuple[int, int]) -> None:
        uses = [use for use in slab.uses if use.source[0] < rows[1] and rows[0] < use.source[1]]
        if not uses:
            return
        band = self.reader.read(slab, rectangles, rows)
        if slab.update is not None:
            merge_rows(slab, band, rows, self._read_matrix)
        compared = sum(self._compare_use(slab, use, band, rows) for use in uses)
        with self._lock:
            self.num_bytes_compared += compared
        self.progress(band.nbytes + compared, compared)

    def _compare_use(self, slab: SlabUses, use: Use, band: Block, rows: tuple[int, int]) -> int:
        """Compare one use of a band; returns the target bytes compared."""
        top, bottom, left, right = use.source
        first, end = max(top, rows[0]), min(bottom, rows[1])
        block = band[first - rows[0] : end - rows[0], left:right]
        planned = use.output.planned
        if planned.recipe is None:
            expected = self._expected(planned, block)
        else:
            assert self.recomputer is not None, f"{planned.name} needs to be recomputed"
            expected = self.recomputer.expected(slab.slab, use, block, (first, left), slab.dtype)
        down, across = planned.packing
        row, column = (use.row + first - top) // down, use.column // across
        region = Region((row, row + (end - first) // down), (column, column + (right - left) // across))
        actual = self.output.read(use.output, region)
        key = ((use.output.file, use.output.index), slab.slab)
        with self._lock:
            self._compared[key] = self._compared.get(key, 0) + actual.size
        if not _equal(expected, actual):
            self._note(key, (first, left), region, (down, across), expected, actual)
        return int(actual.nbytes)

    def _note(
        self,
        key: tuple[TensorId, Slab],
        start: tuple[int, int],
        region: Region,
        packing: tuple[int, int | Fraction],
        expected: Block,
        actual: Block,
    ) -> None:
        different = expected != actual
        row, column = divmod(int(np.argmax(different)), different.shape[1])
        found = Difference(
            *key,
            num_different=int(np.count_nonzero(different)),
            num_compared=actual.size,
            source=(start[0] + row * packing[0], start[1] + int(column * packing[1])),
            target=(region.rows[0] + row, region.columns[0] + column),
            expected=int(expected[row, column]),
            found=int(actual[row, column]),
        )
        with self._lock:
            self._found[key] = self._found[key].merged(found) if key in self._found else found

    def _expected(self, planned: PlannedTensor, block: Block) -> Block:
        """What the target must hold for a block of source elements."""
        if planned.moves_only:
            return block
        assert self.converter is not None, f"{planned.name} needs arithmetic"
        with self.converter.begin(planned, block) as data:
            flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            elements: Block = flat.view(f"u{planned.dtype.itemsize}").reshape(block.shape)
            return elements.copy() if self.converter.in_flight else elements

    def _read_matrix(self, tensor: SourceTensor, rows: tuple[int, int]) -> Block:
        """Rows of a matrix of an adapter, raw. The one read last is kept: bands in a row need the same."""
        kept = self._matrix
        if kept is not None and kept[0] == (tensor.slab, rows):
            return kept[1]
        block = self.reader.tensor(tensor, rows)
        if rows == (0, tensor.shape[0]):
            self._matrix = (tensor.slab, rows), block
        return block


def _equal(expected: Block, actual: Block) -> bool:
    """Whether two blocks hold the same bits; eight bytes at a time where memory allows."""
    contiguous = expected.flags.c_contiguous and actual.flags.c_contiguous
    if contiguous and expected.nbytes % 8 == 0 and expected.dtype == actual.dtype:
        return bool((expected.reshape(-1).view(np.uint64) == actual.reshape(-1).view(np.uint64)).all())
    return bool(np.array_equal(expected, actual))
