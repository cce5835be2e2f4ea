"""Metadata of large checkpoints: parsed within limits, kept as arrays, shared by the processes of a node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from support.large_models import LargeModel, moe_1t, num_chunks, write_large_checkpoint

from dist_export.checkpoint import isolation, torch_dist
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.index_builder import IndexBuilder
from dist_export.checkpoint.isolation import MEMORY_VARIABLE, ParseLimits
from dist_export.checkpoint.torch_dist import index_in_child
from dist_export.errors import ExportError
from dist_export.tensors.boxes import Box

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
STACKED = moe_1t(num_layers=6, num_experts=96, expert_tp=2)
PER_EXPERT = moe_1t(num_layers=6, num_experts=96, expert_tp=2, per_layer=True)
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"


@pytest.fixture(scope="module", params=[STACKED, PER_EXPERT], ids=["stacked", "key per expert"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LargeModel, Path]:
    """A model and its checkpoint, save plans and optimizer state inside."""
    folder = tmp_path_factory.mktemp("large") / "iter_0000010"
    return request.param, write_large_checkpoint(folder, request.param, num_files=7, optimizer=True)


def test_a_child_process_makes_the_same_table(
    checkpoint: tuple[LargeModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = checkpoint
    assert (folder / ".metadata").stat().st_size > torch_dist.IN_PROCESS_BYTES
    here = torch_dist.parse_index(folder)
    assert torch_dist.read_index(folder).to_bytes() == here.to_bytes()
    monkeypatch.setattr(torch_dist, "index_in_child", None)  # small ones do without a process
    monkeypatch.setattr(torch_dist, "IN_PROCESS_BYTES", 1 << 30)
    assert torch_dist.read_index(folder).to_bytes() == here.to_bytes()
    assert here.num_chunks == num_chunks(model.tensors())
    assert {name: info.shape for name, info in here.tensors.items()} == {
        name: tensor.shape for name, tensor in model.tensors().items()
    }
    assert here.ignored["optimizer state"].num_tensors == 3 * len(model.tensors())


def test_a_table_in_a_buffer_is_not_copied_and_equal(checkpoint: tuple[LargeModel, Path]) -> None:
    index = torch_dist.parse_index(checkpoint[1])
    data = index.to_bytes()
    assert len(data) < 120 * index.num_chunks + 100 * len(index.tensors) + 4096
    mapped = CheckpointIndex.from_buffer(data)
    whole = np.frombuffer(data, np.uint8)
    assert all(np.shares_memory(array, whole) for array in mapped._columns.arrays().values() if array.size)
    assert not any(array.flags.writeable for array in mapped._columns.arrays().values())
    assert (mapped.folder, mapped.files, mapped.ignored, mapped.objects) == (
        index.folder, index.files, index.ignored, index.objects
    )  # fmt: skip
    assert mapped.shapes() == index.shapes()
    for name in list(index.tensors)[:40]:
        assert mapped.tensors[name] == index.tensors[name]
        assert mapped.chunks(name) == index.chunks(name)


def test_a_damaged_buffer_is_refused(checkpoint: tuple[LargeModel, Path]) -> None:
    data = torch_dist.parse_index(checkpoint[1]).to_bytes()
    for broken in (b"", data[:7], data[:100], data[: len(data) // 2], data[:-1], b"x" + data[1:]):
        with pytest.raises(ExportError, match="shared index: not a"):
            CheckpointIndex.from_buffer(broken)
    with pytest.raises(ExportError, match="shared index: not a chunk table, or one that was damaged"):
        CheckpointIndex.from_buffer(data.replace(b'["num_chunks","int64"', b'["num_bricks","int64"'))


def test_chunks_of_a_box_are_those_that_touch_it(checkpoint: tuple[LargeModel, Path]) -> None:
    index = torch_dist.parse_index(checkpoint[1])
    name = max(index.tensors, key=lambda name: index.tensors[name].num_chunks)
    every = index.chunks(name)
    assert [chunk.box.start for chunk in every] == sorted(chunk.box.start for chunk in every)
    shape = index.tensors[name].shape
    for parts in product(range(3), repeat=len(shape)):
        start = tuple(size * part // 3 for size, part in zip(shape, parts, strict=True))
        box = Box(start, tuple(max(size // 4, 1) for size in shape))
        expected = [chunk for chunk in every if chunk.box.intersection(box) is not None]
        assert index.chunks(name, box) == expected
        assert index.first_place(name, box) == (expected[0].file, expected[0].offset)


def test_uneven_chunks_of_a_stacked_tensor_are_found_by_binary_search(tmp_path: Path) -> None:
    builder = IndexBuilder(tmp_path, "test", chunks_are_records=False)
    cuts = [0, 40, 41, *range(44, 300), 400]
    starts = [(a, column) for a in cuts[:-1] for column in (0, 3)]
    sizes = [(b - a, size) for a, b in pairwise(cuts) for size in (3, 5)]
    places = [(builder.file(f"f{i % 3}"), 10 * i, 10) for i in range(len(starts))]
    builder.add_boxes("t", (400, 8), "uint8", starts=starts[::-1], sizes=sizes[::-1], places=places[::-1])
    index = builder.build()
    every = index.chunks("t")
    assert [(c.box.start, c.box.size, c.offset) for c in every] == [
        (start, size, place[1]) for start, size, place in zip(starts, sizes, places, strict=True)
    ]
    for row in (0, 39, 40, 41, 43, 44, 298, 299, 399):
        box = Box((row, 2), (1, 1))
        assert index.chunks("t", box) == [c for c in every if c.box.intersection(box)]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda starts, sizes: (starts[1:], sizes[1:]), "16 of 1600 elements are not covered"),
        (lambda starts, sizes: ([*starts, (0, 4)], [*sizes, (1, 8)]), "overlap"),
        (lambda starts, sizes: (starts, [(2, 16), *sizes[1:]]), "overlap"),
        (lambda starts, sizes: ([*starts[:-1], (100, 0)], sizes), "is outside the shape"),
        (lambda starts, sizes: ([*starts[:-1], (1 << 70, 0)], sizes), "is outside the shape"),
        (lambda starts, sizes: ([*starts[:-1], (99,)], sizes), "a chunk has 1 dims"),
    ],
)
def test_many_chunks_that_do_not_tile_are_refused(tmp_path: Path, change, fault: str) -> None:
    starts, sizes = change([(i, 0) for i in range(100)], [(1, 16)] * 100)
    builder = IndexBuilder(tmp_path, "test", chunks_are_records=False)
    builder.add_boxes("t", (100, 16), "uint8", starts=starts, sizes=sizes, places=[(0, 0, 16)] * len(starts))
    with pytest.raises(ExportError, match=f"chunks do not make whole tensors: t: .*{fault}"):
        builder.build()


def hostile(folder: Path, payload: bytes) -> Path:
    """An iteration folder whose metadata is `payload`, otherwise in order."""
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / ".metadata").write_bytes(payload)
    return folder


MANY_DICTS = b"\x80\x04(" + b"}" * (4 * MIB) + b"l."
"""Passes the look before parsing, and takes 64 bytes of memory for each of its own."""


def resident() -> int:
    """Peak resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def test_a_file_that_explodes_costs_its_child_and_names_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hostile(tmp_path / "iter_0000001", MANY_DICTS)
    before = resident()
    message = rf"\.metadata: parsing it needs more than the {200 * MIB} bytes .* more with {MEMORY_VARIABLE}=BYTES"
    with pytest.raises(ExportError, match=message):
        index_in_child(folder, limits=ParseLimits(200 * MIB, 60))
    monkeypatch.setenv(MEMORY_VARIABLE, str(190 * MIB))
    with pytest.raises(ExportError, match=f"needs more than the {190 * MIB} bytes"):
        torch_dist.read_index(folder)
    assert resident() - before < 32 * MIB
    monkeypatch.setenv(MEMORY_VARIABLE, "much")
    with pytest.raises(ExportError, match=f"{MEMORY_VARIABLE}='much' is not a number of bytes"):
        torch_dist.read_index(folder)


def test_with_enough_memory_the_same_file_is_no_metadata(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "iter_0000001", MANY_DICTS)
    with pytest.raises(ExportError, match=r"\.metadata: not checkpoint metadata: it holds a list"):
        torch_dist.read_index(folder)


def test_a_file_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "iter_0000001", MANY_DICTS)
    with pytest.raises(ExportError, match=r"\.metadata: parsing it took more than 0.04 s and was stopped"):
        index_in_child(folder, limits=ParseLimits(1 << 30, 0.02))


def test_no_memory_for_the_interpreter_itself(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "iter_0000001", MANY_DICTS)
    with pytest.raises(ExportError, match=rf"{folder}/\.metadata: "):
        index_in_child(folder, limits=ParseLimits(24 * MIB, 60))


def test_a_killed_child_is_named(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "iter_0000001", MANY_DICTS)
    raised: list[BaseException] = []

    def read() -> None:
        try:
            index_in_child(folder)
        except ExportError as error:
            raised.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 20
    while not (child := _child_named("dist_export.checkpoint.isolation")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    reader.join(20)
    assert [str(error) for error in raised] == [
        f"{folder}/.metadata: the process that parses it was killed by SIGKILL (limit: "
        f"{ParseLimits.for_size(len(MANY_DICTS)).memory} bytes of memory); the file is malformed, or this machine is "
        "out of memory"
    ]


def _child_named(text: str) -> int:
    """The process id of a child of this process whose command line holds `text`; 0 when there is none."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if text.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return 0


def test_faults_of_a_large_checkpoint_read_the_same_from_a_child(tmp_path: Path) -> None:
    folder = write_large_checkpoint(tmp_path / "iter_0000010", STACKED, optimizer=True)
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data[: len(data) // 3])
    with pytest.raises(ExportError) as here:
        torch_dist.parse_index(folder)
    with pytest.raises(ExportError) as there:
        torch_dist.read_index(folder)
    assert str(here.value) == str(there.value)
    (folder / ".metadata").write_bytes(data)
    os.truncate(folder / "__3_0.distcp", 10_000)
    with pytest.raises(ExportError, match=r"__3_0\.distcp: has 10000 bytes, needs \d+; the file is truncated"):
        torch_dist.read_index(folder)


PROGRAM = """
    import json, sys
    from pathlib import Path
    from dist_export import shared_index
    from dist_export.api import Source
    from dist_export.runtime.launch import run_local

    def main(group):
        read, parsed = shared_index.open_checkpoint, []
        shared_index.open_checkpoint = lambda *args, **options: (parsed.append(args), read(*args, **options))[1]
        index = shared_index.open_together(Source(checkpoint=Path(sys.argv[1])), group).index
        maps = Path("/proc/self/maps").read_text().count("memfd:dist_export index (deleted)")
        chunks = [index.chunks(name)[-1].offset for name in index.tensors]
        print(json.dumps([group.rank, len(parsed), maps, sum(chunks), index.num_chunks]) + "\\n", end="", flush=True)
        return 0

    sys.exit(run_local(3, main))
"""


def test_one_process_of_a_node_parses_and_the_others_map(checkpoint: tuple[LargeModel, Path]) -> None:
    index = torch_dist.parse_index(checkpoint[1])
    total = sum(index.chunks(name)[-1].offset for name in index.tensors)
    done = run_program(checkpoint[1])
    assert done.returncode == 0, done.stderr
    ranks = sorted(json.loads(line) for line in done.stdout.splitlines())
    # Rank 0 maps what its parsing child left, the others what rank 0 published.
    assert ranks == [[rank, int(rank == 0), 1, total, index.num_chunks] for rank in range(3)]


def test_what_is_wrong_is_said_once_and_every_process_stops(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "iter_0000001", MANY_DICTS)
    done = run_program(folder)
    assert done.returncode == 2
    assert done.stderr.count("not checkpoint metadata: it holds a list") == 1
    assert "Traceback" not in done.stderr


def run_program(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_isolation_needs_no_torch() -> None:
    command = [sys.executable, "-c", f"import sys, {isolation.__name__}; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0
