"""Every pickled file of every format, with its pickle to be exchanged for another one."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.filesystem import _StorageInfo

from support.every_format import ITERATION, nemo_folder, nemo_rank_folder, write_dcp, write_legacy
from support.other_formats import pack, write_nemo2, write_zarr
from support.small_models import SmallModel
from support.torch_dist import COMMON_STATE, read_metadata, write_metadata, write_torch_dist


@dataclass(frozen=True)
class PickledFile:
    """A pickle in a checkpoint."""

    checkpoint: Path
    """What to open."""
    named: str
    """What errors about it name."""
    pickle: bytes
    put: Callable[[bytes], None]
    """Exchange the pickle."""


def pickled_files(folder: Path, model: SmallModel) -> Iterator[tuple[str, PickledFile]]:
    """(what it is, one pickled file of a checkpoint of its own) for all that are opened."""
    torch_dist = write_torch_dist(folder / "torch_dist", model.tensors, args=model.args)
    yield "torch_dist .metadata", _bare(torch_dist, torch_dist / ".metadata")
    torch_dist = write_torch_dist(folder / "common", model.tensors, args=model.args)
    yield "torch_dist common.pt", _zipped(torch_dist, torch_dist / "common.pt")
    torch_dist = write_torch_dist(folder / "record", model.tensors, args=model.args, common="record")
    yield "torch_dist common state record", _record(torch_dist, COMMON_STATE)
    zarr = write_zarr(folder / "zarr", model.tensors, args=model.args)
    yield "zarr common.pt", _zipped(zarr, zarr / "common.pt")
    legacy = write_legacy(folder / "legacy", model)
    path = legacy / ITERATION / "mp_rank_01_001" / "model_optim_rng.pt"
    yield "legacy", _zipped(legacy, path)
    legacy = write_legacy(folder / "unzipped", model, pp=1, zipped=False)
    yield "legacy before zip", _unzipped(legacy, legacy / ITERATION / "mp_rank_01" / "model_optim_rng.pt")
    nemo = nemo_rank_folder(folder / "nemo_ranks", model)
    yield "nemo ranks", _zipped(nemo, nemo / "mp_rank_01" / "model_weights.ckpt")
    nemo = nemo_rank_folder(folder / "nemo_ranks_packed", model)
    yield "nemo ranks, packed", _packed(_zipped(nemo, nemo / "mp_rank_01" / "model_weights.ckpt"), "w:")
    nemo = nemo_folder(folder / "nemo", model)
    yield "nemo .metadata, compressed", _packed(_bare(nemo, nemo / "model_weights" / ".metadata"), "w:gz")
    nemo2 = write_nemo2(folder / "nemo2", model)
    yield "nemo 2 common.pt", _zipped(nemo2, nemo2 / "weights" / "common.pt")
    dcp = write_dcp(folder / "dcp", model, split=True)
    yield "dcp .metadata", _bare(dcp, dcp / ".metadata")
    dcp = write_dcp(folder / "dcp_args", model, split=True)
    yield "dcp args", _record(dcp, "args")


def _bare(checkpoint: Path, path: Path) -> PickledFile:
    return PickledFile(checkpoint, path.name, path.read_bytes(), lambda data: _write(path, data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _zipped(checkpoint: Path, path: Path) -> PickledFile:
    original = path.read_bytes()
    return PickledFile(
        checkpoint, path.name, _pickle_of(original), lambda data: _write(path, _with_pickle(original, data))
    )


def _unzipped(checkpoint: Path, path: Path) -> PickledFile:
    """The fourth pickle (torch/serialization.py, `_legacy_save`): magic, protocol and system come before."""
    from dist_export.checkpoint.pickles import prescan

    original, starts = path.read_bytes(), [0]
    for _ in range(4):
        starts.append(starts[-1] + prescan(original[starts[-1] :], origin="test", allow_trailing=True).end)
    first, last = starts[3], starts[4]
    return PickledFile(
        checkpoint,
        path.name,
        original[first:last],
        lambda data: _write(path, original[:first] + data + original[last:]),
    )


def _record(folder: Path, key: str) -> PickledFile:
    """A record of a ``.distcp``: another one is put at the end of the file, and the metadata points there."""
    metadata = read_metadata(folder)
    index, place = next((index, info) for index, info in metadata.storage_data.items() if index.fqn == key)
    path = folder / place.relative_path
    original = path.read_bytes()
    record = original[place.offset : place.offset + place.length]

    def put(data: bytes) -> None:
        changed = _with_pickle(record, data)
        path.write_bytes(original + changed)
        metadata.storage_data[index] = _StorageInfo(place.relative_path, len(original), len(changed))
        write_metadata(folder, metadata)

    return PickledFile(folder, path.name, _pickle_of(record), put)


def _packed(inside: PickledFile, mode: str) -> PickledFile:
    archive = inside.checkpoint.with_suffix(".nemo")

    def put(data: bytes) -> None:
        inside.put(data)
        pack(inside.checkpoint, archive, mode=mode)

    put(inside.pickle)
    return PickledFile(archive, archive.name, inside.pickle, put)


def _pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))


def _with_pickle(data: bytes, pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    return buffer.getvalue()
