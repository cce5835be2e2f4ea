"""``torch.save`` files and records, located without torch and compared with what torch loads."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_export.checkpoint.pickles import Record, TensorRef, load_metadata_pickle
from dist_export.checkpoint.torch_save import TensorRecord, ZipEntry, read_entries, read_record, read_state
from dist_export.errors import ExportError

CHECKPOINTS = Path(__file__).parents[1] / "conformance" / "checkpoints"
METADATA = sorted(CHECKPOINTS.glob("*/iter_*/.metadata"))
BASE = 4091
"""Where records begin in these tests: no multiple of the alignment that torch gives data inside of them."""


class Reader:
    """`read_at` over bytes, counting what is read."""

    def __init__(self, data: bytes) -> None:
        self.data = b"\xee" * BASE + data + b"\xee" * 100
        self.reads: list[tuple[int, int]] = []

    def __call__(self, offset: int, size: int) -> bytes:
        assert offset >= BASE, "read before the record"
        self.reads.append((offset, size))
        return self.data[offset : offset + size]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def record_of(data: bytes) -> TensorRecord:
    return read_record(Reader(data), BASE, len(data), origin="r")


def elements(data: bytes, record: TensorRecord) -> torch.Tensor:
    """The tensor that `record` describes, out of the raw bytes of the file."""
    file = bytearray(Reader(data).data)
    dtype = getattr(torch, record.dtype)
    itemsize = dtype.itemsize
    count = (record.storage.offset + record.storage.size - record.offset) // itemsize
    if count == 0:
        return torch.empty(record.shape, dtype=dtype)
    flat = torch.frombuffer(file, dtype=dtype, offset=record.offset, count=count)
    return flat.as_strided(record.shape, record.strides)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


NAMES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 uint16 bool complex64"


class TestRecord:
    @pytest.mark.parametrize("name", NAMES.split())
    def test_every_dtype(self, name: str) -> None:
        raw = torch.randint(0, 2 if name == "bool" else 127, (2 * 3 * 5 * 16,), dtype=torch.uint8)
        dtype = getattr(torch, name)
        data = saved(raw.view(dtype)[: 2 * 3 * 5].reshape(2, 3, 5).clone())
        record = record_of(data)
        assert (record.dtype, record.shape, record.strides) == (name, (2, 3, 5), (15, 5, 1))
        assert record.storage == ZipEntry(record.offset, 30 * dtype.itemsize, record.storage.crc32)
        assert record.storage.crc32 != 0
        assert bits(elements(data, record)) == bits(torch.load(io.BytesIO(data)))

    @pytest.mark.parametrize(
        "view",
        [
            lambda w: w.t(),
            lambda w: w[3:9, 2:5],
            lambda w: w[:, ::3],
            lambda w: w[7],
            lambda w: w[11, 7],
            lambda w: w[:0],
            lambda w: w[:1].expand(5, 8),
            lambda w: torch.nn.Parameter(w[2:]),
            lambda w: torch.nn.Parameter(w, requires_grad=False),
        ],
    )
    def test_views_and_parameters(self, view: Any) -> None:
        tensor = view(torch.arange(96, dtype=torch.float32).to(torch.bfloat16).reshape(12, 8))
        data = saved(tensor)
        record = record_of(data)
        assert (record.shape, record.strides) == (tuple(tensor.shape), tensor.stride())
        assert torch.equal(elements(data, record), tensor)

    @pytest.mark.parametrize("num_elements", [0, 1, 1000, 1_000_000])
    def test_two_reads_at_the_ends_whatever_the_size(self, num_elements: int) -> None:
        data = saved(torch.arange(num_elements))
        reader = Reader(data)
        read_record(reader, BASE, len(data), origin="r")
        assert len(reader.reads) <= 2
        assert sum(size for _, size in reader.reads) <= 8192
        assert all(offset + size <= BASE + len(data) for offset, size in reader.reads)

    @pytest.mark.skipif(not hasattr(torch.serialization, "skip_data"), reason="torch before 2.6 cannot skip data")
    def test_zip64_of_more_than_4_gib(self, tmp_path: Path) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            tensor = torch.empty((2, 2**30 + 7), dtype=torch.bfloat16)
        path = tmp_path / "large.pt"  # sparse: a few blocks on disk
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(tensor, path)
        reads = []
        with path.open("rb") as file:

            def read_at(offset: int, size: int) -> bytes:
                reads.append(size)
                return os.pread(file.fileno(), size, offset)

            record = read_record(read_at, 0, path.stat().st_size, origin="r")
        assert record.shape == (2, 2**30 + 7)
        assert record.storage.size == 2 * (2**31 + 14)
        assert record.offset % 64 == 0
        assert reads == [4096, 4096]
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.partition("/")[2]: info.file_size for info in archive.infolist()}
        assert sizes["data/0"] == record.storage.size

    @pytest.mark.skipif(not hasattr(torch.serialization, "skip_data"), reason="torch before 2.6 cannot skip data")
    def test_zip64_entries_that_begin_beyond_4_gib(self, tmp_path: Path) -> None:
        """Size, packed size and position of the second storage are all in its extra field."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            state = {name: torch.empty((2, 2**30 + more), dtype=torch.bfloat16) for name, more in (("a", 7), ("b", 9))}
        path = tmp_path / "large.pt"  # sparse: a few blocks on disk
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, path)
        with path.open("rb") as file:
            saved = read_state(
                lambda offset, size: os.pread(file.fileno(), size, offset), 0, path.stat().st_size, origin="r"
            )
        first, second = (saved.tensor(saved.value[name]) for name in "ab")
        assert (first.storage.size, second.storage.size) == (2 * (2**31 + 14), 2 * (2**31 + 18))
        assert second.offset >= first.offset + first.storage.size > 2**32

    @pytest.mark.parametrize("path", METADATA, ids=lambda path: path.parts[-3])
    def test_records_of_real_checkpoints(self, path: Path) -> None:
        metadata = load_metadata_pickle(path.read_bytes(), origin="m")
        tensors = 0
        for index, info in metadata.storage_data.items():
            data = (path.parent / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
            if not hasattr(metadata.state_dict_metadata[index.fqn], "chunks"):
                assert isinstance(read_state(Reader(data), BASE, len(data), origin="r").value, list)
                continue
            expected = torch.load(io.BytesIO(data), weights_only=True)
            assert torch.equal(elements(data, record_of(data)), expected)
            tensors += 1
        assert tensors > 20


class Subclass(torch.Tensor):
    pass


class TestRefusedRecords:
    def test_tensor_subclass(self) -> None:
        data = saved(torch.zeros(2).as_subclass(Subclass))
        with pytest.raises(ExportError, match=r"^r: holds an object of .*_rebuild_from_type_v2 of .*Subclass"):
            record_of(data)

    @pytest.mark.parametrize("value", [[torch.zeros(2)], {"a": 1}, None, torch.zeros(2).to_sparse()])
    def test_anything_but_a_tensor(self, value: object) -> None:
        with pytest.raises(ExportError, match=r"^r: holds an? .*expected one plain tensor"):
            record_of(saved(value))

    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            (b"FloatStorage", b"HalfStorage", "has 24 bytes, 12 are declared"),
            (b"K\x02K\x03", b"K\x02K\x04", "does not fit into its storage of 24 bytes"),
            (b"K\x03K\x01", b"K\x04K\x01", "does not fit into its storage of 24 bytes"),
            (b"QK\x00", b"QK\x01", "does not fit into its storage of 24 bytes"),
            (b"K\x06", b"K\x07", "has 24 bytes, 28 are declared"),
            (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001", "storage data/1 is missing"),
            (b"FloatStorage", b"QInt32Storage", "unknown element type qint32"),
        ],
    )
    def test_pickle_that_contradicts_the_storage(self, old: bytes, new: bytes, reason: str) -> None:
        data = rewritten(saved(torch.zeros(2, 3)), {"data.pkl": lambda pickled: pickled.replace(old, new)})
        with pytest.raises(ExportError, match=f"^r: .*{reason}"):
            record_of(data)

    def test_two_storages(self) -> None:
        data = rewritten(saved(torch.zeros(2)), {}, {"data/1": b"1234"})
        with pytest.raises(ExportError, match="holds 2 storages"):
            record_of(data)

    def test_damaged_pickle(self) -> None:
        data = bytearray(saved(torch.zeros(2, 3)))
        data[data.index(b"FloatStorage")] ^= 1
        with pytest.raises(ExportError, match=r"^r: data.pkl is damaged \(its CRC-32 does not match\)"):
            record_of(bytes(data))

    def test_hostile_pickle(self) -> None:
        data = rewritten(saved(torch.zeros(2)), {"data.pkl": lambda _: b"cos\nsystem\n(S'true'\ntR."})
        with pytest.raises(ExportError, match=r"^r: data.pkl: refused: it names os.system"):
            record_of(data)


def rewritten(data: bytes, changes: dict[str, Any], added: dict[str, bytes] | None = None) -> bytes:
    """A ``torch.save`` file with some entries changed or added, zipped anew."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            new.writestr(info.filename, changes.get(name, bytes)(old.read(info)))
        for name, content in (added or {}).items():
            new.writestr(f"archive/{name}", content)
    return buffer.getvalue()


class TestState:
    def test_shared_buffers_and_plain_values(self) -> None:
        buffer = torch.arange(24, dtype=torch.float32)
        model = {"a": buffer[:8].view(2, 4), "b": buffer[8:].view(4, 4).t()}
        data = saved({"step": 3, "model": model, "c": torch.ones(3)})
        state = read_state(Reader(data), BASE, len(data), origin="s")
        assert state.value["step"] == 3
        assert list(state.storages) == ["0", "1"]
        for name, tensor in model.items():
            ref = state.value["model"][name]
            assert isinstance(ref, TensorRef)
            assert torch.equal(elements(data, state.tensor(ref)), tensor)

    def test_real_common_state(self) -> None:
        path = next(CHECKPOINTS.glob("llama_core*/iter_*/common.pt"))
        data = path.read_bytes()
        state = read_state(Reader(data), BASE, len(data), origin="s")
        assert isinstance(state.value["args"], Record)
        assert state.storages == {}

    def test_tensor_outside_of_the_file_is_named(self) -> None:
        changes = {"data.pkl": lambda pickled: pickled.replace(b"K\x06", b"K\x07")}
        data = rewritten(saved({"w": torch.zeros(6)}), changes)
        state = read_state(Reader(data), BASE, len(data), origin="s")
        with pytest.raises(ExportError, match=r"^s: w: storage data/0 has 24 bytes, 28 are declared"):
            state.tensor(state.value["w"], name="w")

    def test_byte_order(self) -> None:
        data = rewritten(saved([1]), {"byteorder": lambda _: b"big"})
        with pytest.raises(ExportError, match=r"^s: byte order b'big'; only little-endian"):
            read_state(Reader(data), BASE, len(data), origin="s")

    def test_size_limit_of_the_pickle(self) -> None:
        data = saved(["x" * 10_000])
        with pytest.raises(ExportError, match=r"^s: data.pkl has 100.. bytes, at most 5000 are accepted"):
            read_state(Reader(data), BASE, len(data), origin="s", max_pickle_bytes=5000)

    def test_no_pickle(self) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("archive/version", "3")
        with pytest.raises(ExportError, match=r"^s: a zip without data.pkl"):
            read_state(Reader(buffer.getvalue()), BASE, len(buffer.getvalue()), origin="s")

    def test_before_torch_1_6(self) -> None:
        buffer = io.BytesIO()
        torch.save([1], buffer, _use_new_zipfile_serialization=False)
        with pytest.raises(ExportError, match=r"^s: is not a zip as torch.save writes it since torch 1.6"):
            read_state(Reader(buffer.getvalue()), BASE, len(buffer.getvalue()), origin="s")

    def test_unreadable_file(self) -> None:
        def read_at(offset: int, size: int) -> bytes:
            raise OSError(5, "Input/output error")

        with pytest.raises(ExportError, match=r"^s: cannot be read: Input/output error"):
            read_state(read_at, 0, 1000, origin="s")


class TestEntries:
    @pytest.mark.parametrize("num_tensors", [1, 400])
    def test_as_zipfile_sees_them(self, num_tensors: int) -> None:
        data = saved([torch.full((i + 1,), i) for i in range(num_tensors)])
        entries = read_entries(Reader(data), BASE, len(data), origin="z")
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            assert {name: (entry.size, entry.crc32) for name, entry in entries.items()} == {
                info.filename.partition("/")[2]: (info.file_size, info.CRC) for info in file.infolist()
            }
            for name, entry in entries.items():
                raw = Reader(data).data[entry.offset : entry.offset + entry.size]
                assert raw == file.read(f"archive/{name}")

    def test_without_checksums(self) -> None:
        if not hasattr(torch.serialization, "set_crc32_options"):
            pytest.skip("torch before 2.6 always computes them")
        torch.serialization.set_crc32_options(False)
        try:
            data = saved(torch.ones(3))
        finally:
            torch.serialization.set_crc32_options(True)
        assert torch.equal(elements(data, record_of(data)), torch.ones(3))

    @pytest.mark.parametrize("keep", [0, 3, 21, 100, 5000, -1, -22, -23, -400])
    def test_cut(self, keep: int) -> None:
        data = saved(torch.arange(2000))[:keep]
        with pytest.raises(ExportError, match=r"^z: (is not a zip|does not end as a zip does)"):
            read_entries(Reader(data), BASE, len(data), origin="z")

    def test_file_shorter_than_announced(self) -> None:
        data = saved(torch.arange(2000))
        with pytest.raises(ExportError, match=r"^z: is cut: 4096 bytes wanted"):
            read_entries(Reader(data), BASE, len(data) + 4096, origin="z")

    def test_more_after_the_end(self) -> None:
        data = saved(torch.arange(2000)) + b"more"
        with pytest.raises(ExportError, match="more was written after it"):
            read_entries(Reader(data), BASE, len(data), origin="z")

    def test_compressed(self) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", b"x" * 1000)
        with pytest.raises(ExportError, match=r"entry b'archive/data.pkl' is compressed"):
            read_entries(Reader(buffer.getvalue()), BASE, len(buffer.getvalue()), origin="z")

    @pytest.mark.parametrize(
        ("names", "reason"),
        [
            (["archive/a", "other/b"], "has 2 top folders"),
            (["archive/a", "archive/a"], "has two entries 'a'"),
            (["plain"], "has an entry b'plain', which torch.save does not write"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_foreign_names(self, names: list[str], reason: str) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name in names:
                file.writestr(name, b"1")
        with pytest.raises(ExportError, match=f"^z: {reason}"):
            read_entries(Reader(buffer.getvalue()), BASE, len(buffer.getvalue()), origin="z")

    @pytest.mark.parametrize(
        ("at", "value", "reason"),
        [
            (24, 1 << 20, "does not fit into the file"),  # size, with the packed size
            (42, 1 << 20, "overlaps another or lies outside"),  # local header
            (42, 7, "(overlaps another|does not begin with its header)"),
        ],
    )
    def test_directory_that_points_elsewhere(self, at: int, value: int, reason: str) -> None:
        data = bytearray(saved(torch.arange(3)))
        entry = data.rindex(b"archive/data/0") - 46
        struct.pack_into("<I", data, entry + at, value)
        if at == 24:
            struct.pack_into("<I", data, entry + 20, value)
        with pytest.raises(ExportError, match=reason):
            read_entries(Reader(bytes(data)), BASE, len(data), origin="z")

    def test_overlapping_entries(self) -> None:
        data = bytearray(saved(torch.arange(300)))
        entry = data.index(b"PK\x01\x02")  # of data.pkl, grown over its neighbours
        struct.pack_into("<II", data, entry + 20, 1000, 1000)
        with pytest.raises(ExportError, match="overlaps another"):
            read_entries(Reader(bytes(data)), BASE, len(data), origin="z")


RECORD = saved(torch.nn.Parameter(torch.arange(2000, dtype=torch.float32).reshape(40, 50).t()))


class TestDamage:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 1 << 15), st.integers(0, 7)), min_size=1, max_size=4), st.booleans())
    def test_flipped_bits(self, flips: list[tuple[int, int]], ends: bool) -> None:
        damaged = bytearray(RECORD)
        for position, bit in flips:  # half of the time near the ends, where everything but the data lies
            damaged[(position % 2000 - 1000) if ends else position % len(damaged)] ^= 1 << bit
        try:
            record = record_of(bytes(damaged))
        except ExportError as error:
            assert str(error).startswith("r: ")
        else:
            assert BASE <= record.offset <= record.storage.offset + record.storage.size <= BASE + len(RECORD)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, len(RECORD) - 1))
    def test_truncation(self, length: int) -> None:
        with pytest.raises(ExportError, match=r"^r: "):
            record_of(RECORD[:length])
