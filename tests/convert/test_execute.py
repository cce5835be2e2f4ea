"""Execution on real files: any grid of chunks, in any order of dims, gives what torch gives."""

from __future__ import annotations

import io
import itertools
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

torch = pytest.importorskip("torch")

from support.exports import raw_bytes, tensors_of  # noqa: E402
from support.torch_dist import Chunk, read_metadata, write_metadata, write_torch_dist  # noqa: E402

from dist_export.checkpoint.torch_dist import read_index  # noqa: E402
from dist_export.convert.execute import Budget, Executor  # noqa: E402
from dist_export.convert.ledger import checksum_of  # noqa: E402
from dist_export.convert.numpy_arithmetic import NumpyArithmetic  # noqa: E402
from dist_export.convert.outputs import OutputFile  # noqa: E402
from dist_export.convert.sources import SourceFiles  # noqa: E402
from dist_export.convert.torch_arithmetic import TorchArithmetic  # noqa: E402
from dist_export.errors import ExportError, Faults  # noqa: E402
from dist_export.models.value_ops import ValueOp  # noqa: E402
from dist_export.plan.placement import fills_of, make_placement, work_of  # noqa: E402
from dist_export.plan.shard import PlannedTensor, ShardPlan, place  # noqa: E402
from dist_export.plan.work import collect_uses  # noqa: E402
from dist_export.tensors.dtypes import dtype_by_name  # noqa: E402
from dist_export.tensors.views import Slab, View, concatenate  # noqa: E402

DTYPES = ("float32", "float16", "bfloat16")


class Silent:
    def progress(self, num_bytes_read: int, num_bytes_written: int) -> None:
        pass


def execute(
    checkpoint: Path, folder: Path, shards: list[ShardPlan], *, num_processes: int = 1, tile_bytes: int = 1 << 20,
    num_threads: int = 2, arithmetic: object = None,
) -> int:  # fmt: skip
    """Write the shards with the work of `num_processes` (one after another); returns the bytes read.

    Checks that the merged ledgers give each tensor's checksum.
    """
    index = read_index(checkpoint)
    for shard in shards:
        OutputFile.create(folder / shard.file_name, shard.header, shard.num_data_bytes)
    slabs, fills = collect_uses(dict(enumerate(shards)), index.shapes())
    placement = make_placement([0] * num_processes, [shard.num_data_bytes for shard in shards])
    runs: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    num_bytes_read = 0
    for process in range(num_processes):
        sources = SourceFiles(index)
        outputs = {number: OutputFile(folder / shard.file_name) for number, shard in enumerate(shards)}
        executor = Executor(sources, outputs, budget=Budget(num_threads, tile_bytes), observer=Silent())
        executor.converter = arithmetic or NumpyArithmetic()  # type: ignore[assignment]
        executor.run(work_of(process, placement, slabs), fills_of(process, placement, fills))
        for output in outputs.values():
            output.finish()
        sources.close()
        num_bytes_read += sources.num_bytes_read
        for key, found in executor.ledger.runs().items():
            runs.setdefault(key, []).extend(found)
    faults = Faults("export")
    for number, shard in enumerate(shards):
        written = tensors_of(folder / shard.file_name)
        for position, tensor in enumerate(shard.tensors):
            crc = checksum_of(
                runs.get((number, position), []), name=tensor.name, num_bytes=tensor.num_bytes, faults=faults
            )
            assert crc == zlib.crc32(raw_bytes(written[tensor.name])), tensor.name
    faults.raise_if_any()
    return num_bytes_read


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    return st.sets(st.integers(1, max(size - 1, 1)), max_size=3).map(lambda inner: sorted({0, size} | inner))


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], dict[str, list[Chunk]]]:
    """A few tensors, each cut into its own grid; some stored transposed; one stacked over layers."""
    tensors, chunks = {}, {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for name, ndim in (("a", 2), ("b", 2), ("norm", 1), ("stacked", 3)):
        shape = tuple(draw(st.integers(1, 9)) for _ in range(ndim))
        dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
        tensor = torch.randn(shape, generator=generator).to(dtype)
        if ndim > 1 and draw(st.booleans()):
            tensor = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        tensors[name] = tensor
        grid: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
        for size in shape:
            edges = draw(cuts(size)) if size > 1 else [0, size]
            grid = [
                ((*start, a), (*sizes, b - a))
                for start, sizes in grid
                for a, b in itertools.pairwise(edges)
            ]
        chunks[name] = [(draw(st.integers(0, 2)), *box) for box in grid]
    return tensors, chunks


@st.composite
def targets(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> list[tuple[PlannedTensor, torch.Tensor]]:
    """Planned tensors with what torch makes of the same: narrow, join, pad, add one, cast, transpose."""
    result = []
    for number in range(draw(st.integers(1, 5))):
        name = draw(st.sampled_from(sorted(tensors)))
        slab, value = Slab(name), tensors[name]
        if name == "stacked":
            layer = draw(st.integers(0, value.shape[0] - 1))
            slab, value = Slab(name, (layer,)), value[layer]
        view, source = View.of(slab, tuple(value.shape)), value
        for dim in range(value.dim()):
            start = draw(st.integers(0, value.shape[dim] - 1))
            length = draw(st.integers(1, value.shape[dim] - start))
            view, value = view.narrow(dim, start, length), value.narrow(dim, start, length)
        if draw(st.booleans()):
            dim = draw(st.integers(0, value.dim() - 1))
            view, value = concatenate([view, view], dim), torch.cat([value, value], dim)
        ops = draw(st.sampled_from([(), (), (ValueOp.ADD_ONE,), (ValueOp.SUBTRACT_ONE,)]))
        pad = draw(st.integers(0, 3)) if not ops else 0
        dim = draw(st.integers(0, value.dim() - 1))
        view = view.pad(dim, view.shape[dim] + pad)
        zeros = torch.zeros(*value.shape[:dim], pad, *value.shape[dim + 1 :], dtype=value.dtype)
        value = torch.cat([value, zeros], dim)
        for op in ops:
            value = value + 1 if op is ValueOp.ADD_ONE else value - 1
        target = dtype_by_name(draw(st.sampled_from(DTYPES)))
        value = value.to(getattr(torch, target.name))
        transposed = value.dim() == 2 and draw(st.booleans())
        source_dtype = dtype_by_name(str(source.dtype).removeprefix("torch."))
        planned = PlannedTensor(f"t{number}", target, view, source_dtype, ops, transposed)
        result.append((planned, value.t() if transposed else value))
    return result


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_chunks_any_pieces_equal_torch(data: st.DataObject) -> None:
    tensors, chunks = data.draw(checkpoints())
    wanted = data.draw(targets(tensors))
    split = data.draw(st.integers(0, len(wanted)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_torch_dist(folder / "c", tensors, args={}, chunks=lambda name, _: chunks[name])
        parts = [part for part in (wanted[:split], wanted[split:]) if part]
        shards = [place([planned for planned, _ in part], f"{n}.safetensors") for n, part in enumerate(parts)]
        execute(
            checkpoint, folder, shards,
            num_processes=data.draw(st.integers(1, 3)),
            tile_bytes=data.draw(st.sampled_from([1, 40, 200, 1 << 20])),
            num_threads=data.draw(st.integers(1, 2)),
            arithmetic=data.draw(st.sampled_from([NumpyArithmetic(), TorchArithmetic()])),
        )  # fmt: skip
        for number, part in enumerate(parts):
            written = tensors_of(folder / f"{number}.safetensors")
            for planned, expected in part:
                assert raw_bytes(written[planned.name]) == raw_bytes(expected), planned


def planned_copy(name: str, shape: tuple[int, ...]) -> ShardPlan:
    bfloat16 = dtype_by_name("bfloat16")
    return place([PlannedTensor(name, bfloat16, View.of(Slab(name), shape), bfloat16, ())], "0.safetensors")


def test_more_files_than_descriptors_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_export.convert.sources.MAX_OPEN_FILES", 2)
    tensor = torch.randn(12, 3).bfloat16()
    checkpoint = write_torch_dist(
        tmp_path / "c", {"w": tensor}, args={}, chunks=lambda _n, _t: [(row, (row, 0), (1, 3)) for row in range(12)]
    )
    execute(checkpoint, tmp_path, [planned_copy("w", (12, 3))])
    assert raw_bytes(tensors_of(tmp_path / "0.safetensors")["w"]) == raw_bytes(tensor)


def replace_record(checkpoint: Path, value: object) -> None:
    """Point the only record of ``w`` to another one."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    (checkpoint / "__5_0.distcp").write_bytes(buffer.getvalue())
    metadata = read_metadata(checkpoint)
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "w")
    info.relative_path, info.offset, info.length = "__5_0.distcp", 0, buffer.tell()
    write_metadata(checkpoint, metadata)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4, 6), r"the record of w \[0:4, 0:6\] at byte 0 holds float32 \[4, 6\], expected bfloat16"),
        (torch.zeros(6, 4).bfloat16(), r"holds bfloat16 \[6, 4\], expected bfloat16 \[4, 6\]"),
        (torch.zeros(4, 12).bfloat16()[:, ::2], r"strides \[12, 2\]: neither its rows nor its columns are contiguous"),
        (torch.zeros(1, 6).bfloat16().expand(4, 6), r"strides \[0, 1\]: neither its rows nor its columns"),
        ([torch.zeros(4, 6).bfloat16()], "holds a list, expected one plain tensor"),
    ],
    ids=["element type", "shape", "every other column", "expanded", "list"],
)
def test_a_record_that_is_not_what_the_metadata_promises(tmp_path: Path, value: object, message: str) -> None:
    checkpoint = write_torch_dist(tmp_path / "c", {"w": torch.zeros(4, 6).bfloat16()}, args={})
    replace_record(checkpoint, value)
    with pytest.raises(ExportError, match=f"__5_0.distcp: .*{message}"):
        execute(checkpoint, tmp_path, [planned_copy("w", (4, 6))])


def test_parts_of_larger_storages_are_found(tmp_path: Path) -> None:
    """A record may hold more than its tensor: torch saves the whole storage of a view."""
    whole = torch.randn(8, 10).bfloat16()
    checkpoint = write_torch_dist(tmp_path / "c", {"w": torch.zeros(4, 6).bfloat16()}, args={})
    replace_record(checkpoint, whole[2:6, 3:9])
    execute(checkpoint, tmp_path, [planned_copy("w", (4, 6))])
    assert raw_bytes(tensors_of(tmp_path / "0.safetensors")["w"]) == raw_bytes(whole[2:6, 3:9])


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    checkpoint = write_torch_dist(tmp_path / "c", {"w": torch.randn(64, 64).bfloat16()}, args={})
    index = read_index(checkpoint)
    sources = SourceFiles(index)
    sources.rectangles(Slab("w"), (64, 64), dtype_by_name("bfloat16"))
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ExportError, match=r"__0_0.distcp: ends at byte 100, needed up to 116; it was cut short while"):
        sources.read_into(0, 100, memoryview(bytearray(16)))
    sources.close()


def test_budget_bounds_the_buffers() -> None:
    default = Budget.within(1 << 30, num_threads=2, value_ops=False)
    assert default.tile_bytes == 1 << 20
    small = Budget.within(4 << 20, num_threads=4, value_ops=True)
    assert small.tile_bytes * 4 * 8 <= 4 << 20
    assert structs.replace(small, num_threads=1).num_threads == 1
