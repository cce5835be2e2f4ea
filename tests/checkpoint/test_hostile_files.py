"""Hostile and damaged pickles in every pickled file of every format: one error that names the file, and no more."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

from support.every_format import plain_model, write_legacy  # noqa: E402
from support.hostile_pickles import HOSTILE  # noqa: E402
from support.other_formats import write_zarr  # noqa: E402
from support.pickled_files import PickledFile, pickled_files  # noqa: E402

from dist_export.checkpoint import isolation, legacy, nemo_ranks, rank_states, torch_dist, torch_save  # noqa: E402
from dist_export.checkpoint.contents import contents  # noqa: E402
from dist_export.checkpoint.isolation import MEMORY_VARIABLE  # noqa: E402
from dist_export.checkpoint.open import Checkpoint, open_checkpoint  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402

MIB = 1 << 20
FILES = (
    *("torch_dist .metadata", "torch_dist common.pt", "torch_dist common state record", "zarr common.pt", "legacy"),
    *("legacy before zip", "nemo ranks", "nemo ranks, packed", "nemo .metadata, compressed", "nemo 2 common.pt"),
    *("dcp .metadata", "dcp args"),
)
NOISE = Random(0).randbytes(100_000)
MANY_DICTS = b"\x80\x04B" + len(NOISE).to_bytes(4, "little") + NOISE + b"0(" + b"}" * (4 * MIB) + b"l."
"""Passes the look before parsing, and takes 64 bytes of memory for each of its own."""
IN_MEMORY = [name for name in FILES if not name.startswith(("torch_dist .", "zarr", "nemo 2", "nemo ranks,", "dcp ."))]
"""One of each way to read them."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PickledFile]:
    return dict(pickled_files(tmp_path_factory.mktemp("files"), plain_model()))


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pickle is parsed by a process of its own, however small."""
    for module in (isolation, torch_dist, torch_save, rank_states, nemo_ranks):
        monkeypatch.setattr(module, "IN_PROCESS_BYTES", 0)


def opened(file: PickledFile) -> Checkpoint:
    checkpoint = open_checkpoint(file.checkpoint)
    assert checkpoint.arguments is not None
    return checkpoint


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_all_are_listed(files: dict[str, PickledFile]) -> None:
    assert tuple(files) == FILES
    for file in files.values():
        opened(file)


@pytest.mark.parametrize("name", FILES)
def test_hostile_pickles(
    name: str, files: dict[str, PickledFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the canary would be
    file = files[name]
    for hostile, data in HOSTILE.items():
        if len(data) < MIB // 4:  # the larger ones take time
            file.put(data)
            with pytest.raises(ExportError) as caught:
                opened(file)
            assert file.named in str(caught.value), hostile
            assert len(str(caught.value)) < 2000
    file.put(file.pickle)
    opened(file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("name", IN_MEMORY)
def test_pickles_that_take_memory_cost_another_process(
    name: str, files: dict[str, PickledFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, before = files[name], resident()
    monkeypatch.setenv(MEMORY_VARIABLE, str(200 * MIB))
    file.put(MANY_DICTS)
    with pytest.raises(ExportError) as caught:
        opened(file)
    file.put(file.pickle)
    assert f"needs more than the {200 * MIB} bytes of memory it may take" in str(caught.value)
    assert file.named in str(caught.value)
    assert resident() - before < 32 * MIB


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("name", FILES)
def test_another_process_reads_the_same(
    name: str, files: dict[str, PickledFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = opened(files[name])
    monkeypatch.undo()
    here = opened(files[name])
    assert there.index.to_bytes() == here.index.to_bytes()
    assert (there.arguments, there.iteration) == (here.arguments, here.iteration)


@pytest.mark.parametrize("name", FILES)
def test_damage(name: str, files: dict[str, PickledFile]) -> None:
    """Flipped bytes and cuts end in an error or a table, soon; the checksum of the zip is made to fit."""
    file, random, refused, start = files[name], Random(name), 0, time.monotonic()
    size = len(file.pickle)
    for number in range(60):
        data = bytearray(file.pickle)
        for _ in range(1 + number % 3):
            data[random.randrange(size)] = random.randrange(256)
        file.put(bytes(data if number % 4 else data[: random.randrange(size)]))
        try:
            open_checkpoint(file.checkpoint)
        except ExportError:
            refused += 1
    file.put(file.pickle)
    assert refused > 15
    assert time.monotonic() - start < 30


def test_one_process_reads_all_ranks_and_names_the_one_at_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = write_legacy(tmp_path / "save", plain_model())
    here = legacy.read_index(save / "iter_0000010")
    calls = []
    run = isolation.subprocess.run
    monkeypatch.setattr(isolation.subprocess, "run", lambda *a, **k: (calls.append(a), run(*a, **k))[1])
    monkeypatch.setattr(rank_states, "IN_PROCESS_BYTES", 0)
    assert legacy.read_index(save / "iter_0000010").to_bytes() == here.to_bytes()
    assert len(calls) == 1
    path = save / "iter_0000010" / "mp_rank_01_000" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "model": {}, "more": [{} for _ in range(100_000)]}, path)
    monkeypatch.setenv(MEMORY_VARIABLE, str(150 * MIB))
    message = r"mp_rank_01_000/model_optim_rng\.pt: .*needs more than the \d+ bytes|lacks .*decoder"
    with pytest.raises(ExportError, match=message):
        legacy.read_index(save / "iter_0000010")


def test_real_sizes_are_parsed_by_another_process(tmp_path: Path) -> None:
    """Nothing but the size decides: a file of weights is larger than what is parsed here."""
    model = plain_model(padded_vocab_size=64 << 10)
    save = write_legacy(tmp_path / "save", model, tp=1, pp=1)
    path = save / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    assert path.stat().st_size > isolation.IN_PROCESS_BYTES
    (there,), here = rank_states.read_rank_states([path]), rank_states.read_rank_state(path, 0)
    assert (there.chunks, there.unused, there.path) == (here.chunks, here.unused, here.path)
    assert there.arguments == here.arguments == {**model.args}


def test_objects_that_no_export_needs_stay_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zarr's sharded objects, ModelOpt's state and other trainers' files."""
    monkeypatch.chdir(tmp_path)
    folder = write_zarr(tmp_path / "zarr", plain_model().tensors, args=plain_model().args)
    hostile = HOSTILE["os.system in protocol 4"]
    (folder / "modelopt_state").mkdir()
    for name in ("modelopt_state/common.pt", "modelopt_state/.metadata", "train_state.pt"):
        (folder / name).write_bytes(hostile)
    (folder / "decoder.layers.mlp.linear_fc1._extra_state" / "shard_0_2.pt").write_bytes(hostile)
    assert open_checkpoint(folder).iteration == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zarr"]


def test_state_of_layers_that_is_hostile_is_not_read(tmp_path: Path) -> None:
    folder = write_zarr(tmp_path / "zarr", plain_model().tensors, args=plain_model().args)
    path = folder / "decoder.layers.mlp.linear_fc1._extra_state" / "shard_0_2.pt"
    assert contents(open_checkpoint(folder).index) == ["1 records of layers that are no weights (_extra_state): empty"]
    torch.save({"scale": [1.0]}, path)
    assert "quantiser state of TransformerEngine or ModelOpt" in contents(open_checkpoint(folder).index)[0]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", HOSTILE["os.system in protocol 2"])
    (line,) = contents(open_checkpoint(folder).index)
    assert "not readable" in line and "refused: it names posix.system" in line
