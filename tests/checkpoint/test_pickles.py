"""Reading pickles without trusting them: real ones, hostile ones, damaged ones."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import pickletools
import signal
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.hostile_pickles import CANARY, HOSTILE, calls, saved_pickle
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from dist_export.checkpoint.pickle_bounds import METADATA_LIMITS, MalformedError
from dist_export.checkpoint.pickle_bulk_scan import bulk_scan
from dist_export.checkpoint.pickle_scan import _Walk
from dist_export.checkpoint.pickles import (
    Record,
    ScanLimits,
    StorageRef,
    TensorRef,
    cut_local_plans,
    load_metadata_pickle,
    load_state_pickle,
    prescan,
)
from dist_export.errors import ExportError

CHECKPOINTS = Path(__file__).parents[1] / "conformance" / "checkpoints"
METADATA = sorted(CHECKPOINTS.glob("*/iter_*/.metadata"))


def metadata_pickle(*, num_chunks: int, plans: bool, protocol: int = 4) -> bytes:
    """A ``.metadata`` of torch's own classes, as it looks after ranks have sent each other their plans."""
    value = dcp.Metadata({}, None, {})
    items = []
    for i in range(num_chunks // 4):
        key, properties = f"decoder.layers.{i}.weight", dcp.TensorProperties(dtype=torch.bfloat16)
        boxes = [dcp.ChunkStorageMetadata(torch.Size((j, 0)), torch.Size((1, 5120))) for j in range(4)]
        value.state_dict_metadata[key] = dcp.TensorStorageMetadata(properties, torch.Size((4, 5120)), boxes)
        for j, box in enumerate(boxes):
            index = dcp.MetadataIndex(key, box.offsets, j)
            value.storage_data[index] = _StorageInfo(f"__{j}_0.distcp", i << 32, 10752)
            items.append(WriteItem(index, WriteItemType.SHARD, None, TensorWriteData(box, properties, box.sizes)))
    if plans:
        value.all_local_plans = [SavePlan(items)]  # type: ignore[attr-defined]
    return pickle.dumps(pickle.loads(pickle.dumps(value)), protocol)


def content(metadata: Any) -> tuple[Any, ...]:
    """Everything in metadata, ours or torch's, as plain values."""
    tensors = {
        key: (str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size), [box(c) for c in entry.chunks])
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks")
    }
    records = {
        (key.fqn, None if key.offset is None else tuple(key.offset)): (info.relative_path, info.offset, info.length)
        for key, info in metadata.storage_data.items()
    }
    return list(metadata.state_dict_metadata), tensors, records


def box(chunk: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(chunk.offsets), tuple(chunk.sizes)


class TestMetadata:
    @pytest.mark.parametrize("path", METADATA, ids=lambda path: path.parts[-3])
    def test_real_checkpoints_as_torch_reads_them(self, path: Path) -> None:
        data = path.read_bytes()
        assert content(load_metadata_pickle(data, origin="m")) == content(pickle.loads(data))

    @pytest.mark.parametrize("path", METADATA, ids=lambda path: path.parts[-3])
    def test_cutting_the_plans_changes_nothing_else(self, path: Path) -> None:
        data = path.read_bytes()
        shorter = cut_local_plans(data)
        assert len(shorter) < 0.7 * len(data)
        assert cut_local_plans(shorter) == shorter
        uncut = data.replace(b"\x8c\x0fall_local_plans", b"\x8c\x0fALL_LOCAL_PLANS")
        assert content(load_metadata_pickle(shorter, origin="m")) == content(load_metadata_pickle(uncut, origin="m"))

    @pytest.mark.parametrize("protocol", [4, 5])
    @pytest.mark.parametrize("plans", [False, True])
    def test_thousands_of_chunks_over_many_frames(self, *, protocol: int, plans: bool) -> None:
        data = metadata_pickle(num_chunks=4000, plans=plans, protocol=protocol)
        assert data.count(b"\x95") > 3
        assert content(load_metadata_pickle(data, origin="m")) == content(pickle.loads(data))
        assert (len(cut_local_plans(data)) < len(data)) is plans

    def test_plans_that_are_not_the_last_attribute_stay(self) -> None:
        value = pickle.loads(metadata_pickle(num_chunks=8, plans=False))
        key = "all_local_plans"  # as a tensor, whose neighbours must not be cut off with it
        value.state_dict_metadata = {key: dcp.BytesStorageMetadata(), **value.state_dict_metadata}
        data = pickle.dumps(value, 4)
        assert cut_local_plans(data) == data
        assert list(load_metadata_pickle(data, origin="m").state_dict_metadata) == list(value.state_dict_metadata)

    def test_what_newer_and_older_torch_writes(self) -> None:
        value = pickle.loads(metadata_pickle(num_chunks=4, plans=False))
        value.storage_meta = dcp.StorageMeta(Path("/somewhere"), "save", "load")
        value.mcore_data = {"a": {"nd_reformulated_orig_global_shape": (2, 3)}}
        value.version = "1.0.0"
        for info in value.storage_data.values():
            info.transform_descriptors = ["stream.zstd/1"]
        read = load_metadata_pickle(pickle.dumps(value, 4), origin="m")
        assert read.mcore_data == value.mcore_data
        assert read.others == {"version": "1.0.0"}
        assert {tuple(info.transform_descriptors) for info in read.storage_data.values()} == {("stream.zstd/1",)}

    def test_unknown_field_is_refused(self) -> None:
        value = pickle.loads(metadata_pickle(num_chunks=4, plans=False))
        next(iter(value.state_dict_metadata.values())).chunks[0].compression = "zstd"
        with pytest.raises(ExportError, match=r"m: .*ChunkStorageMetadata with unknown fields compression"):
            load_metadata_pickle(pickle.dumps(value, 4), origin="m")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda m: setattr(m, "storage_data", [1]), "not dictionaries"),
            (lambda m: m.state_dict_metadata.update({7: dcp.BytesStorageMetadata()}), "neither a tensor nor an object"),
            (lambda m: m.state_dict_metadata.update(x=7), "'x' that is neither"),
            (lambda m: setattr(next(iter(m.storage_data.values())), "offset", "0"), "no file, offset and length"),
            (lambda m: next(iter(m.state_dict_metadata.values())).chunks.append(None), "chunk without offsets"),
        ],
    )
    def test_fields_of_a_wrong_type(self, change: Any, reason: str) -> None:
        value = pickle.loads(metadata_pickle(num_chunks=4, plans=False))
        change(value)
        with pytest.raises(ExportError, match=f"m: not checkpoint metadata: .*{reason}"):
            load_metadata_pickle(pickle.dumps(value, 4), origin="m")

    @pytest.mark.parametrize("value", [argparse.Namespace(a=1), torch.device("cpu"), OrderedDict, io.BytesIO(b"")])
    def test_any_other_class_is_refused_by_name(self, value: object) -> None:
        metadata = pickle.loads(metadata_pickle(num_chunks=4, plans=False))
        metadata.planner_data = [value]
        data = pickle.dumps(metadata, 4)
        if value is OrderedDict:  # allowed: torch_dcp's planner data holds some
            load_metadata_pickle(data, origin="m")
            return
        name = type(value).__name__
        with pytest.raises(ExportError, match=rf"^m: refused: it names \w+\.{name}, which has no place"):
            load_metadata_pickle(data, origin="m")

    def test_another_pickle(self) -> None:
        with pytest.raises(ExportError, match=r"m: not checkpoint metadata: it holds a dict"):
            load_metadata_pickle(pickle.dumps({"a": 1}), origin="m")


class TestState:
    def test_saved_arguments_of_a_real_checkpoint(self) -> None:
        path = next(CHECKPOINTS.glob("llama_core*/iter_*/common.pt"))
        with zipfile.ZipFile(path) as file:
            state = load_state_pickle(file.read("common/data.pkl"), origin="c")
        args = state["args"]
        assert args.kind == "argparse.Namespace"
        assert (args.get("num_layers"), args.get("params_dtype"), args.get("absent", 3)) == (4, "bfloat16", 3)
        assert args.get("attention_backend").kind == "megatron.core.transformer.enums.AttnBackend"
        assert args.get("attention_backend").args == (5,)

    @pytest.mark.parametrize("protocol", range(6))
    def test_plain_values_in_every_protocol(self, protocol: int) -> None:
        value = {"a": [1, -(2**70), 2.5, None, True, "é\n", (), (1, (2, (3,)))], (1, "k"): {"n": {}}, 5: "x" * 70_000}
        assert load_state_pickle(pickle.dumps(value, protocol), origin="s") == value
        as_bytes = load_state_pickle(pickle.dumps([b"\x00\xff", b""], protocol), origin="s")
        assert [b"" if isinstance(item, Record) else item for item in as_bytes] == [b"\x00\xff", b""]

    @pytest.mark.parametrize("protocol", range(6))
    def test_objects_become_inert_records(self, protocol: int) -> None:
        value = {"namespace": argparse.Namespace(a=1), "path": Path("a"), "enum": signal.SIGTERM}
        read = load_state_pickle(pickle.dumps(value, protocol), origin="s")
        assert {key: type(item).__mro__[1] for key, item in read.items()} == dict.fromkeys(value, Record)
        assert read["namespace"].get("a") == 1
        assert read["path"].args == ("a",)
        assert (read["enum"].kind, read["enum"].args) == ("signal.Signals", (15,))

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_buffers_and_sets(self, protocol: int) -> None:
        read = load_state_pickle(pickle.dumps([io.BytesIO(b"abc"), {1, 2}], protocol), origin="s")
        assert read[0].state[0] == b"abc"
        assert sorted(read[1] if protocol >= 4 else read[1].args[0]) == [1, 2]

    def test_ordered_dict_with_attributes(self) -> None:
        value: OrderedDict[str, int] = OrderedDict(a=1, b=2)
        value._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as Module.state_dict sets it
        read = load_state_pickle(pickle.dumps(value), origin="s")
        assert dict(read) == value
        assert not hasattr(read, "_metadata")

    def test_tensors_views_and_parameters(self) -> None:
        buffer = torch.zeros(20, dtype=torch.float16)
        value = {
            "view": buffer[4:16].view(3, 4).t(),
            "parameter": torch.nn.Parameter(torch.zeros(2, 3)),
            "scalar": torch.tensor(1.0, dtype=torch.bfloat16),
            "fp8": torch.zeros(4, dtype=torch.float8_e4m3fn),
        }
        read = load_state_pickle(saved_pickle(value), origin="s")
        assert read["view"] == TensorRef("float16", StorageRef("0", "float16", "cpu", 20), 4, (4, 3), (1, 4))
        assert read["parameter"] == TensorRef("float32", StorageRef("1", "float32", "cpu", 6), 0, (2, 3), (3, 1))
        assert read["scalar"] == TensorRef("bfloat16", StorageRef("2", "bfloat16", "cpu", 1), 0, (), ())
        assert read["fp8"] == TensorRef("float8_e4m3fn", StorageRef("3", None, "cpu", 4), 0, (4,), (1,))
        assert pickle.loads(pickle.dumps(read["view"])) == read["view"]

    def test_tensors_whose_bytes_are_not_their_values_are_no_tensors(self) -> None:
        values = [torch.zeros(2, dtype=torch.complex64).conj(), torch.zeros(2).to_sparse()]
        for read in load_state_pickle(saved_pickle(values), origin="s"):
            assert isinstance(read, Record)

    def test_storages_outside_only_where_expected(self) -> None:
        with pytest.raises(ExportError, match=r"s: .*storages outside of it"):
            load_state_pickle(saved_pickle(torch.zeros(2)), origin="s", persistent=False)

    def test_trailing_bytes(self) -> None:
        data = pickle.dumps([1]) + b"more"
        with pytest.raises(ExportError, match=r"s: 4 bytes follow the end"):
            load_state_pickle(data, origin="s")
        assert load_state_pickle(data, origin="s", allow_trailing=True) == [1]
        assert prescan(data, origin="s", allow_trailing=True).end == len(data) - 4


class TestPrescan:
    @pytest.mark.parametrize("path", METADATA, ids=lambda path: path.parts[-3])
    def test_agrees_with_pickletools(self, path: Path) -> None:
        data = path.read_bytes()
        summary = prescan(data, origin="m")
        opcodes = [opcode.name for opcode, _, _ in pickletools.genops(data)]
        assert (summary.end, summary.num_opcodes) == (len(data), len(opcodes))
        assert summary.max_memo == opcodes.count("MEMOIZE") - 1
        assert ("torch.distributed.checkpoint.metadata", "MetadataIndex") in summary.globals
        assert len(summary.globals) == opcodes.count("STACK_GLOBAL")

    @pytest.mark.parametrize("plans", [False, True])
    def test_both_walks_agree(self, *, plans: bool) -> None:
        data = metadata_pickle(num_chunks=2000, plans=plans)
        assert bulk_scan(data, METADATA_LIMITS) == _Walk(data, METADATA_LIMITS).run()

    @pytest.mark.parametrize("block", [280, 289, 323, 373, 1024])
    def test_borders_of_blocks_may_fall_anywhere(self, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        monkeypatch.setattr("dist_export.checkpoint.pickle_bulk_scan._BLOCK", block)
        for data in (LARGE, METADATA[0].read_bytes()):
            assert bulk_scan(data, METADATA_LIMITS) == _Walk(data, METADATA_LIMITS).run()

    @pytest.mark.parametrize("wrap", [b"\x85", b"N\x86", b"NN\x87", b"\x94(h\x00t"])
    @pytest.mark.parametrize("padding", [0, 1 << 17])
    def test_nested_tuples_are_bounded_whatever_the_size(self, wrap: bytes, padding: int) -> None:
        nested = wrap * 300 if b"h" not in wrap else _chain_through_memo(300)
        data = b"\x80\x04}(" + b"K\x01K\x02" * (padding // 4) + b")" + nested + b"Nu."
        with pytest.raises(ExportError, match="nested deeper than 256"):
            prescan(data, origin="d")
        assert bulk_scan(data, METADATA_LIMITS) is None


def _chain_through_memo(length: int) -> bytes:
    """Tuples each of which holds the one before, fetched from the memo; the last is on the stack."""
    steps = b"".join(b"0j" + struct.pack("<I", i) + b"\x85\x94" for i in range(length))
    return b"\x94" + steps


# Hostile pickles. Each must be refused, or read as something inert, without running anything and within
# 512 MiB of address space. They are loaded in a process of its own, which reports what became of each.

INERT = {"bytearray(N)", "list(range(N))", "Decimal(N)"}
"""What may be read: it costs no more than its own size and does nothing."""

PROGRAM = """
    import json, pathlib, resource, sys, time
    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    from dist_export.checkpoint.pickles import load_metadata_pickle, load_state_pickle
    from dist_export.errors import ExportError
    outcome = {}
    for path in pathlib.Path("corpus").iterdir():
        for load in (load_state_pickle, load_metadata_pickle):
            try:
                value = load(path.read_bytes(), origin="the file")
                hash(value) if value.__hash__ else None
                outcome.setdefault(path.name, []).append("read " + type(value).__name__)
            except ExportError as error:
                outcome.setdefault(path.name, []).append(str(error))
    modules = sorted({"torch", "numpy", "subprocess", "pty", "commands"} & set(sys.modules))
    print(json.dumps({"outcome": outcome, "modules": modules}))
"""


@pytest.fixture(scope="module")
def hostile_outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "corpus").mkdir()
    for number, data in enumerate(HOSTILE.values()):
        (folder / "corpus" / str(number)).write_bytes(data)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert not (folder / "canary").exists()
    assert report["modules"] == []
    return {name: report["outcome"][str(number)] for number, name in enumerate(HOSTILE)}


class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_refused_or_inert(self, hostile_outcome: dict[str, list[str]], name: str) -> None:
        state, metadata = hostile_outcome[name]
        assert metadata.startswith("the file: ")
        assert state.startswith("read " if name in INERT else "the file: ")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("os.system in protocol 4", "refused: it names posix.system, which no checkpoint needs"),
            ("eval in protocol 0", "refused: it names __builtin__.eval"),
            ("builtins getattr", "refused: it names builtins.getattr"),
            ("STACK_GLOBAL", "refused: it names os.system"),
            ("INST", "refused: it names os.system"),
            ("EXT1", "extension-registry"),
            ("memo bomb", "memo index 2147483647 at byte 3, after 3 opcodes"),
            ("BINBYTES8", "announces 1152921504606846976 bytes, 1 are left"),
            ("tuples as a key, protocol 4", "nested deeper than 256"),
            ("marks", "more than 1024 marks"),
            ("keys with one hash", "more than 10000 integers of more than 7 bytes"),
            ("a million names", "names more than 4096 classes"),
            ("encode again and again", "expands to more bytes than it has"),
            ("sets", "MemoryError"),
            ("slots of a class", "TypeError"),
            ("slots of a tensor", "TensorRef takes no state"),
        ],
    )
    def test_the_reason_is_said(self, hostile_outcome: dict[str, list[str]], name: str, reason: str) -> None:
        assert reason in hostile_outcome[name][0]

    def test_names_outside_the_standard_library_are_kept_and_never_called(self) -> None:
        read = load_state_pickle(calls("torch.hub", "load"), origin="s")
        assert (read.kind, read.args) == ("torch.hub.load", (CANARY,))


# Damage

SMALL = cut_local_plans(METADATA[0].read_bytes())
LARGE = metadata_pickle(num_chunks=1000, plans=False)
ARGUMENTS = argparse.Namespace(a=[1, 2.5], b=io.BytesIO(b"x"), c=torch.float32)
COMMON = saved_pickle({"args": ARGUMENTS, "w": torch.nn.Parameter(torch.ones(2))})


def flipped(data: bytes, flips: list[tuple[int, int]]) -> bytes:
    damaged = bytearray(data)
    for position, bit in flips:
        damaged[position % len(data)] ^= 1 << bit
    return bytes(damaged)


FLIPS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), min_size=1, max_size=4)
LIMITS = ScanLimits(max_opcodes=1_000_000)


class TestDamage:
    @settings(max_examples=150, deadline=None)
    @given(FLIPS, st.integers(0, 1 << 16))
    def test_state(self, flips: list[tuple[int, int]], length: int) -> None:
        for data in (flipped(COMMON, flips), COMMON[: length % len(COMMON)]):
            try:
                load_state_pickle(data, origin="s", limits=LIMITS)
            except ExportError as error:
                assert str(error).startswith("s: ")

    @settings(max_examples=100, deadline=None)
    @given(FLIPS, st.integers(0, 1 << 16))
    def test_metadata(self, flips: list[tuple[int, int]], length: int) -> None:
        for data in (flipped(SMALL, flips), SMALL[: length % len(SMALL)]):
            try:
                load_metadata_pickle(data, origin="m")
            except ExportError as error:
                assert str(error).startswith("m: ")

    @settings(max_examples=60, deadline=None)
    @given(FLIPS)
    @example([(66139, 2)])
    def test_the_bulk_walk_accepts_nothing_that_the_exact_walk_refuses(self, flips: list[tuple[int, int]]) -> None:
        data = flipped(LARGE, flips)
        summary = bulk_scan(data, METADATA_LIMITS)
        if summary is not None:
            try:
                exact = _Walk(data, METADATA_LIMITS).run()
            except MalformedError as error:  # the one thing it leaves to the unpickler
                assert "was never stored" in str(error)
                with pytest.raises(ExportError, match="Memo value not found"):
                    load_metadata_pickle(data, origin="flipped")
                return
            assert (summary.end, summary.num_opcodes) == (exact.end, exact.num_opcodes)
            assert summary.max_memo == exact.max_memo

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from([bytes([op]) for op in b"()N]}\x85\x86\x87\x93\x94tRbuesaK02.\x81h\x8f\x90\x91"])))
    def test_random_opcodes(self, opcodes: list[bytes]) -> None:
        data = b"\x80\x04" + b"".join(opcodes) + b"."
        try:
            load_state_pickle(data, origin="s", limits=LIMITS)
        except ExportError as error:
            assert str(error).startswith("s: ")
