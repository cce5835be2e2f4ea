"""Applying a delta to the export it was made against, on this machine: checked, then changed as a refit changes it.

Every tensor of the result is proved: those in the delta by their checksums, all others by reading the old ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32
from msgspec import Struct, field

from dist_export.errors import ExportError, Faults
from dist_export.refit import redo
from dist_export.refit.base import Base, BaseFolder, content_digest, document_faults
from dist_export.refit.blocks import read_all
from dist_export.refit.delta import DOCUMENTS, Delta, DeltaFolder
from dist_export.refit.files import Changes, ComparedFiles
from dist_export.refit.session import GRAVE, PREPARED, open_staging
from dist_export.runtime import publication
from dist_export.runtime.failure import PeerFailedError
from dist_export.runtime.group import Group
from dist_export.runtime.publication import CONFIG, MANIFEST
from dist_export.runtime.watch import Watcher
from dist_export.tensors.safetensors_format import StoredTensor, read_header
from dist_export.verify.files import LOADED

_COPY_BYTES = 1 << 20


class _Tensor(Struct, frozen=True):
    """A tensor of the new export: in the delta, or as it is in the old one."""

    number: int
    """Of its file."""
    file: str
    name: str
    path: Path
    """What holds its new bytes."""
    source: StoredTensor
    place: StoredTensor
    """In the old file, which is also where it goes."""
    checksum: str

    @property
    def is_new(self) -> bool:
        return self.source is not self.place


class DeltaSession(Struct):
    """One process's part of applying a delta."""

    delta: Delta
    base: Base
    group: Group
    already_done: bool = False
    """After `run`: the output holds what the delta leads to already."""
    num_tensors: int = 0
    """Of the export."""
    num_bytes: int = 0
    changes: Changes = field(default_factory=Changes)
    changed_names: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Check and apply. All ranks call it. Raises `ExportError`; the output is then as it was."""
        if all(new["content"] == old.content for new, old in self._new_and_old()):
            self.already_done = True
            return
        staging = None
        try:
            if self.group.rank == 0:
                publication.check_output(self.base.output, overwrite=True)
                self.base.check_writable()
                staging = open_staging(self.base.output)
                self.base.check_current()
            tensors = self._tensors()
            self.group.barrier("delta opened")
            files = self._compare(tensors)
            if staging is not None:
                record = self._commit(staging.folder / PREPARED, files)
                self.base.check_current()
                staging.lease.check(staging.folder)
                redo.commit(staging.folder / PREPARED, self.base.output, record)
            self.group.barrier("delta committed")
            grave = publication.staging_folder(self.base.output) / GRAVE
            redo.apply(self.base.output, self.group, grave=grave, step="delta")
        except Exception as error:
            if not isinstance(error, PeerFailedError):
                self.group.fail(error)  # before the files vanish, or the others would report that instead
            raise
        finally:
            if staging is not None:
                staging.abandon(keep=False)

    def _pairs(self) -> list[tuple[DeltaFolder, BaseFolder]]:
        """The delta's folders with those of the output. Raises `ExportError` unless they are the same."""
        found = {each.folder: each for each in self.delta.folders}
        if sorted(found) != sorted(each.folder for each in self.base.folders):
            names = ", ".join(sorted(found)), ", ".join(each.folder for each in self.base.folders)
            raise ExportError(f"{self.delta.path}: is for the folders {names[0]}; {self.base.output} has {names[1]}")
        return [(found[each.folder], each) for each in self.base.folders]

    def _new_and_old(self) -> Iterator[tuple[dict[str, Any], BaseFolder]]:
        """What the delta leads to, per folder. Raises `ExportError` when it is for another export than this."""
        wrong = []
        pairs = self._pairs()
        for new, old in pairs:
            content = old.content
            if content not in (new.base.get("content"), new.new.get("content")):
                wrong.append(
                    f"{old.path} holds iteration {old.iteration} (content {content[:12]}), the delta was made against "
                    f"iteration {new.base.get('iteration')} (content {str(new.base.get('content'))[:12]})"
                )
        if wrong:
            raise ExportError(
                f"{self.delta.path}: is not for this export: {'; '.join(wrong)}; apply the deltas in between first, or "
                "export the checkpoint anew"
            )
        return iter([(dict(new.new), old) for new, old in pairs])

    def _tensors(self) -> list[_Tensor]:
        """All tensors of the new export. Raises one `ExportError` for all that does not fit."""
        faults = Faults(f"{self.delta.path}: cannot be applied")
        tensors: list[_Tensor] = []
        number = 0
        for new, old in self._pairs():
            manifest = self._new_manifest(new)
            for name in old.tensor_files:
                tensors += _tensors_of(self.delta.path / new.folder, new, old, name, number, manifest, faults)
                number += 1
            unknown = sorted(new.files.keys() - {*old.tensor_files})
            faults.extend(f"{name}: is no file of {old.path}" for name in unknown)
        faults.raise_if_any()
        self.num_tensors = len(tensors)
        self.num_bytes = sum(tensor.place.num_bytes for tensor in tensors)
        return tensors

    def _new_manifest(self, new: DeltaFolder) -> dict[str, Any]:
        """The manifest that the delta brings, checked against the index."""
        path = self.delta.path / new.folder / DOCUMENTS / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            content = content_digest(manifest)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ExportError(f"{path}: cannot be read: {error}") from error
        if redo.digest_of(path) != new.documents.get(MANIFEST) or content != new.new.get("content"):
            raise ExportError(f"{path}: is not the one that the delta was made with")
        return dict(manifest)

    def _compare(self, tensors: Sequence[_Tensor]) -> ComparedFiles:
        """Check this process's share of the tensors and log what changes. All ranks call it."""
        group, watcher = self.group, Watcher(self.group)
        group.enter_phase("transfer")
        files = ComparedFiles(group, self.base.output, publication.staging_folder(self.base.output) / PREPARED)
        starts: dict[int, list[int]] = {}
        for tensor in tensors:
            starts.setdefault(tensor.number, []).append(tensor.place.offset)
        files.open({number: (path, sorted(starts.get(number, ()))) for number, path in enumerate(self._paths())})
        mine = _share(tensors, group.rank, group.world_size)
        group.progress.add(total=sum(tensor.place.num_bytes for tensor in mine))
        faults = Faults(f"{self.delta.path}: cannot be applied to {self.base.output}")
        try:
            for tensor in mine:
                faults.extend(_compare(tensor, files, watcher))
            faults.raise_if_any()
            files.finish()
        finally:
            files.close()
        self.changes = files.changes
        for number, changed in files.changes.tensors.items():
            ordered = sorted((t for t in tensors if t.number == number), key=lambda tensor: tensor.place.offset)
            self.changed_names |= {ordered[index].name for index in changed}
        return files

    def _paths(self) -> list[str]:
        return [f"{each.folder}/{name}" for each in self.base.folders for name in each.tensor_files]

    def _commit(self, prepared: Path, files: ComparedFiles) -> redo.Commit:
        """Rank 0: bring the documents, and say what is to be done."""
        changes = []
        for number, (new, old) in enumerate(self._pairs()):
            target = prepared / redo.DOCUMENTS / str(number)
            target.mkdir()
            for name, digest in new.documents.items():
                _copy(self.delta.path / new.folder / DOCUMENTS / name, target / name, digest)
            _check_config(old.path / CONFIG, target / CONFIG)
            gone = sorted(set(old.manifest.get("copied") or ()) - set(new.documents))
            changes.append(old.change(target, remove=gone))
        return redo.Commit(tuple(self._paths()), files.changes.logs, tuple(changes))


def _tensors_of(
    folder: Path, new: DeltaFolder, old: BaseFolder, name: str, number: int, manifest: dict[str, Any], faults: Faults
) -> Iterator[_Tensor]:
    """The tensors of one file, wherever they come from; what does not fit is added to `faults`."""
    places = _header(old.path / name)
    brought = new.files.get(name, {"num_bytes": 0, "tensors": {}})
    sources = _header(folder / name) if name in new.files and (folder / name).is_file() else {}
    wanted = manifest["files"].get(name, {}).get("tensors", {})
    if sources.keys() != brought["tensors"].keys():
        faults.add(f"{folder / name}: is missing, or holds other tensors than the index says")
    if wanted.keys() != places.keys() or not sources.keys() <= places.keys():
        faults.add(f"{old.path / name}: holds other tensors than the new export")
        return
    for tensor, place in places.items():
        source = sources.get(tensor, place)
        if (source.dtype, source.shape) != (place.dtype, place.shape):
            expected = f"{place.dtype} {list(place.shape)}"
            faults.add(f"{name}: {tensor} is {source.dtype} {list(source.shape)}, expected {expected}")
        path = folder / name if tensor in sources else old.path / name
        yield _Tensor(number, name, tensor, path, source, place, str(wanted[tensor]["crc32"]))


def _header(path: Path) -> dict[str, StoredTensor]:
    """`read_header`, of a file that may be missing: other ranks come here before rank 0 has looked at all files."""
    try:
        return read_header(path)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error


def _share(tensors: Sequence[_Tensor], rank: int, world_size: int) -> list[_Tensor]:
    """One rank's tensors: contiguous runs of about equal size, so that files are read in order."""
    total, before, kept = sum(tensor.place.num_bytes for tensor in tensors), 0, []
    for tensor in tensors:
        if before * world_size // max(total, 1) == rank:
            kept.append(tensor)
        before = min(before + tensor.place.num_bytes, total - 1)
    return kept


def _compare(tensor: _Tensor, files: ComparedFiles, watcher: Watcher) -> Iterator[str]:
    """Read a tensor's new bytes, log where they differ, and check them all; yields what is wrong."""
    checksum, buffer = 0, memoryview(bytearray(min(_COPY_BYTES, tensor.source.num_bytes)))
    with tensor.path.open("rb") as file:
        for first in range(0, tensor.source.num_bytes, _COPY_BYTES):
            part = buffer[: min(_COPY_BYTES, tensor.source.num_bytes - first)]
            read_all(file.fileno(), tensor.source.offset + first, part, tensor.path)
            checksum = int(crc32(part, checksum))
            if tensor.is_new:
                files.files[tensor.number].write_at(tensor.place.offset + first, part)
            watcher.progress(part.nbytes, part.nbytes)
    if f"{checksum:08x}" != tensor.checksum:
        what = "in the delta has" if tensor.is_new else "in the export, which the delta does not change, has"
        said = f"{what} checksum {checksum:08x}, expected {tensor.checksum}; the file is damaged"
        yield f"{tensor.file}: {tensor.name}: {said}"


def _check_config(old: Path, new: Path) -> None:
    """The configuration must stay what it is. Raises `ExportError`."""
    try:
        found = json.loads(new.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"the delta's {CONFIG} cannot be read: {error}") from error
    faults = Faults("the delta is not of the model that was exported")
    faults.extend(document_faults(old, found, "of the delta"))
    faults.raise_if_any()


def _copy(source: Path, target: Path, digest: str) -> None:
    """Copy a document. Raises `ExportError` when it is not what the index says, or no document."""
    is_weights = source.name.endswith(LOADED) and not source.name.endswith(".index.json")
    if is_weights or redo.digest_of(source) != digest:
        raise ExportError(f"{source}: is not the document that the delta was made with")
    try:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        if hashlib.sha256(target.read_bytes()).hexdigest() != digest:
            raise ExportError(f"{target}: was not copied whole")
    except OSError as error:
        raise ExportError(f"{target}: cannot write: {error.strerror}") from error
