"""Checksums of an export's tensors, and what their values show by themselves: NaN, infinities, all zeros.

Files are cut into segments that ranks share; the CRC-32 of segments combine into that of the tensor, which is
compared with the manifest's. Memory is one block per thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from msgspec import Struct, field, to_builtins

from dist_export.convert.ledger import Run, merged
from dist_export.plan.shard import PlannedTensor
from dist_export.plan.work import OutputTensor
from dist_export.tensors.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32, FLOAT64, DType
from dist_export.verify.findings import CHECKSUMS, Finding
from dist_export.verify.output import OutputReader, PlannedOutput, TensorId

BLOCK_BYTES = 1 << 20
SEGMENT_BYTES = 64 << 20  # of a tensor; what ranks and threads share out

SPECIAL = {
    FLOAT64: 0x7FF0000000000000,
    FLOAT32: 0x7F800000,
    FLOAT16: 0x7C00,
    BFLOAT16: 0x7F80,
    FLOAT8_E5M2: 0x7C,
    FLOAT8_E4M3: 0x7F,
}
"""Bits without sign from which on an element is no finite number (float8_e4m3fn has one NaN and no infinities)."""


class Segment(Struct, frozen=True):
    """Bytes ``start : end`` of a tensor."""

    output: OutputTensor
    start: int
    end: int


class SegmentResult(Struct):
    """What one segment holds. Exchanged between ranks as JSON."""

    tensor: TensorId
    run: Run
    """(offset, length, CRC-32)"""
    num_special: int = 0
    """Elements that are NaN or infinite."""
    first_special: int = -1
    """Element number, within the tensor, of the first of them."""
    any_set: bool = False
    """Whether some byte is not zero."""


class TensorSums(Struct):
    """Results of all segments of all tensors."""

    by_tensor: dict[TensorId, list[SegmentResult]] = field(default_factory=dict)

    def add(self, results: Iterable[SegmentResult]) -> None:
        """Take over results of a rank."""
        for each in results:
            self.by_tensor.setdefault(each.tensor, []).append(each)


def segments_of(output: PlannedOutput, files: Sequence[int]) -> list[Segment]:
    """All tensors of `files` in segments, in order of their place in the files."""
    segments = []
    for tensor in sorted(output.tensors.values(), key=lambda t: (t.file, t.offset)):
        if tensor.file in files:
            size = tensor.planned.num_bytes
            for start in range(0, size, SEGMENT_BYTES):
                segments.append(Segment(tensor, start, min(start + SEGMENT_BYTES, size)))
    return segments


def share(segments: Sequence[Segment], rank: int, world_size: int) -> list[Segment]:
    """One rank's segments: a contiguous part with about the same bytes as every other."""
    total = sum(segment.end - segment.start for segment in segments)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    kept, position = [], 0
    for segment in segments:
        if first <= position < last:
            kept.append(segment)
        position += segment.end - segment.start
    return kept


def checksum_segments(
    segments: Sequence[Segment], reader: OutputReader, *, num_threads: int, progress: Callable[[int, int], None]
) -> list[SegmentResult]:
    """Read segments and sum them up; `progress` is told (bytes read, bytes done), from any thread."""
    with ThreadPoolExecutor(num_threads, "checksum") as pool:
        return list(pool.map(lambda segment: _checksum(segment, reader, progress), segments))


def encode(results: Iterable[SegmentResult]) -> bytes:
    """As bytes for another rank."""
    return json.dumps([to_builtins(each) for each in results]).encode()


def decode(data: bytes) -> list[SegmentResult]:
    """What `encode` made."""
    results = [SegmentResult(**values) for values in json.loads(data)]
    for each in results:
        each.tensor, each.run = (each.tensor[0], each.tensor[1]), (each.run[0], each.run[1], each.run[2])
    return results


def _checksum(segment: Segment, reader: OutputReader, progress: Callable[[int, int], None]) -> SegmentResult:
    output, memory, crc = segment.output, memoryview(bytearray(BLOCK_BYTES)), 0
    result = SegmentResult((output.file, output.index), (segment.start, segment.end - segment.start, 0))
    for start in range(segment.start, segment.end, BLOCK_BYTES):
        block = memory[: min(BLOCK_BYTES, segment.end - start)]
        reader.read_at(output.file, output.offset + start, block)
        crc = int(crc32(block, crc))
        _look(result, block, output.planned.dtype, start)
        progress(block.nbytes, block.nbytes)
    result.run = (segment.start, segment.end - segment.start, crc)
    return result


def _look(result: SegmentResult, block: memoryview, dtype: DType, start: int) -> None:
    """Note what the values of a block at byte `start` show."""
    elements = np.frombuffer(block, f"u{dtype.itemsize}")
    result.any_set = result.any_set or bool(elements.any())
    limit = SPECIAL.get(dtype)
    if limit is None:
        return
    # Without the sign bit, finite numbers are those below `limit`; shifting the sign out costs one pass.
    doubled = elements << elements.dtype.type(1)
    if int(doubled.max(initial=0)) < 2 * limit:
        return
    special = doubled >= doubled.dtype.type(2 * limit)
    if result.first_special < 0:
        result.first_special = start // dtype.itemsize + int(np.argmax(special))
    result.num_special += int(np.count_nonzero(special))


def checksum_findings(
    output: PlannedOutput, sums: TensorSums, files: Mapping[str, Any]
) -> tuple[list[Finding], list[str]]:
    """(faults, warnings) of all tensors whose segments were read. `files` is the manifest's table."""
    faults, zeros = [], []
    for key, results in sorted(sums.by_tensor.items()):
        planned, where = output.tensors[key].planned, output.where(key)
        runs = merged(each.run for each in results)
        assert len(runs) == 1 and runs[0][1] == planned.num_bytes, f"{where}: segments do not make the tensor"
        expected = files[output.file_names[key[0]]]["tensors"][planned.name].get("crc32")
        if f"{runs[0][2]:08x}" != expected:
            faults.append(
                Finding(CHECKSUMS, where, f"was changed: its CRC-32 is {runs[0][2]:08x}, the manifest has {expected}")
            )
        num_special = sum(each.num_special for each in results)
        if num_special:
            first = min(each.first_special for each in results if each.num_special)
            index = [int(i) for i in np.unravel_index(first, planned.shape or (1,))]
            noun = "element is" if num_special == 1 else "elements are"
            faults.append(Finding(CHECKSUMS, where, f"{num_special} {noun} NaN or infinite, the first at {index}"))
        if not any(each.any_set for each in results) and not _meant_to_be_zero(planned):
            zeros.append(where)
    return faults, [_zeros_warning(zeros)] if zeros else []


def _meant_to_be_zero(planned: PlannedTensor) -> bool:
    """Whether the plan fills all of the tensor: biases that the consumer has and the checkpoint lacks."""
    return all(piece.slab is None for piece in planned.view.pieces)


def _zeros_warning(names: Sequence[str]) -> str:
    shown = "; ".join(names[:5]) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} all zero: {shown}"


def sha256_of(reader: OutputReader, files: Iterable[int]) -> Iterator[tuple[str, str]]:
    """(name, SHA-256) of whole files."""
    memory = memoryview(bytearray(BLOCK_BYTES))
    for number in files:
        path, state, offset = reader.folder / reader.file_names[number], hashlib.sha256(), 0
        size = path.stat().st_size
        while offset < size:
            block = memory[: min(BLOCK_BYTES, size - offset)]
            reader.read_at(number, offset, block)
            state.update(block)
            offset += block.nbytes
        yield path.name, state.hexdigest()


def sha256_findings(digests: Mapping[str, str], files: Mapping[str, Any]) -> list[Finding]:
    """Files whose SHA-256 is not what the manifest has; those it has none for are only reported."""
    return [
        Finding(CHECKSUMS, name, f"was changed: its SHA-256 is {digest}, the manifest has {files[name]['sha256']}")
        for name, digest in digests.items()
        if isinstance(files.get(name), dict) and files[name].get("sha256", digest) != digest
    ]
