"""The redo folder: all that a refit changes, complete and on disk before the export itself is touched.

It appears in the output in one step (`commit`), which is the decision that the refit happens. Then its blocks are
written to their places and its documents moved there. Each of these steps may be cut short and done again, by the same
run or by a later one: the bytes are the same. Until the end the export has no config.json, so that nothing takes it for
whole. Without the folder the export is what it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from isal.isal_zlib import crc32
from msgspec import Struct, to_builtins

from dist_export.convert.journal import read_fingerprint
from dist_export.convert.outputs import write_error
from dist_export.errors import ExportError
from dist_export.refit.blocks import BLOCKS, INDEX, read_all, read_index, sync, write_all
from dist_export.runtime import publication
from dist_export.runtime.group import Group
from dist_export.runtime.publication import CONFIG, MANIFEST, REFIT
from dist_export.runtime.watch import Watcher

FORMAT_VERSION = 1
_RECORDS = 1 << 12
COMMIT, LOGS, DOCUMENTS = "commit.json", "logs", "documents"

Told = Callable[[int, int], None]
"""Called with bytes read and written; may raise to stop the work."""


class FolderChange(Struct, frozen=True):
    """What becomes of one target's folder."""

    folder: str
    """Within the output: ``.``, or the name of a target."""
    base_manifest: str
    """SHA-256 of the manifest before."""
    new_manifest: str
    remove: tuple[str, ...] = ()
    """Files that the new export no longer has."""


class Commit(Struct, frozen=True):
    """What a redo folder is for, and what it must hold."""

    files: tuple[str, ...]
    """The tensor files, within the output, in the order of their numbers in the logs."""
    logs: Mapping[str, int]
    """Name of each log -> bytes of its blocks."""
    folders: tuple[FolderChange, ...]


def commit(prepared: Path, output: Path, record: Commit) -> None:
    """Make a prepared folder (its logs are on disk) the redo folder of `output`, in one step. Raises `ExportError`."""
    text = json.dumps({"format_version": FORMAT_VERSION, **to_builtins(record)}, indent=1)
    publication.write_file(prepared / COMMIT, f"{text}\n".encode())
    with _writing(output / REFIT):
        for folder in (prepared, *(path for path in prepared.rglob("*") if path.is_dir())):
            publication.sync_folder(folder)
        os.rename(prepared, output / REFIT)
    with _going_on(output), _writing(output):
        publication.sync_folder(output)


class Redo:
    """The redo folder of an output, whoever put it there. One process calls the methods without `logs`."""

    def __init__(self, output: Path) -> None:
        """Read what is to be done. Raises `ExportError` when that cannot be read, or cannot be right."""
        self.output, self.folder = output, output / REFIT
        self.commit = _read(self.folder / COMMIT)
        for name in self.commit.files:
            _check_file(output, name)
        for change in self.commit.folders:
            self._check_manifest(change)

    @property
    def logs(self) -> list[str]:
        """The names of the logs."""
        return sorted(self.commit.logs)

    def withhold_configurations(self) -> None:
        """Remove every old config.json: nothing takes the export for whole until the new one is there.

        Raises `ExportError`, as do the others.
        """
        for number, change in enumerate(self.commit.folders):
            place = self.output / change.folder
            with _writing(place):
                if not (self.folder / DOCUMENTS / str(number) / CONFIG).is_file():
                    continue
                (place / CONFIG).unlink(missing_ok=True)
                publication.sync_folder(place)

    def write_blocks(self, logs: Iterable[str], told: Told) -> None:
        """Write the blocks of some logs to their places and wait until they are on disk. Raises `ExportError`."""
        descriptors: dict[int, int] = {}
        try:
            for name in logs:
                self._write_log(name, descriptors, told)
            for number, descriptor in descriptors.items():
                sync(descriptor, self.output / self.commit.files[number])
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    def place_documents(self) -> None:
        """Move the documents to their places: manifests behind the others, config.json last."""
        for wanted in (lambda name: name not in (MANIFEST, CONFIG), MANIFEST.__eq__, CONFIG.__eq__):
            for number, change in enumerate(self.commit.folders):
                source, place = self.folder / DOCUMENTS / str(number), self.output / change.folder
                with _writing(place):
                    for path in [path for path in source.iterdir() if wanted(path.name)]:
                        os.replace(path, place / path.name)
                    for name in change.remove:
                        (place / name).unlink(missing_ok=True)
                    publication.sync_folder(place)

    def remove(self, grave: Path) -> None:
        """End: the folder disappears in one step, by way of `grave`."""
        shutil.rmtree(grave, ignore_errors=True)
        with _writing(self.folder):
            os.rename(self.folder, grave)
            publication.sync_folder(self.output)
        shutil.rmtree(grave, ignore_errors=True)

    def _write_log(self, name: str, descriptors: dict[int, int], told: Told) -> None:
        records, positions = read_index(self.folder / LOGS, name)
        path = self.folder / LOGS / f"{name}{BLOCKS}"
        buffer = bytearray(int(records["length"].max()) if len(records) else 0)
        with _reading(path), path.open("rb") as blocks:
            for first in range(0, len(records), _RECORDS):  # as Python objects they take much memory
                part = slice(first, first + _RECORDS)
                for record, position in zip(records[part].tolist(), positions[part].tolist(), strict=True):
                    number, length, offset, checksum = record
                    data = memoryview(buffer)[:length]
                    read_all(blocks.fileno(), position, data, path)
                    if int(crc32(data)) != checksum:
                        raise ExportError(f"{path}: byte {position}: has another checksum; the log is damaged. {_ANEW}")
                    if number not in descriptors:
                        descriptors[number] = self._open(number)
                    write_all(descriptors[number], offset, data, self.output / self.commit.files[number])
                    told(length, length)

    def _open(self, number: int) -> int:
        if number >= len(self.commit.files):
            raise ExportError(f"{self.folder}: a log names file {number} of {len(self.commit.files)}. {_ANEW}")
        path = self.output / self.commit.files[number]
        try:
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise write_error(path, error) from error

    def _check_manifest(self, change: FolderChange) -> None:
        _check_name(change.folder, self.folder)
        path = self.output / change.folder / MANIFEST
        if digest_of(path) not in (change.base_manifest, change.new_manifest):
            whole = all(os.path.isfile(self.output / each.folder / CONFIG) for each in self.commit.folders)
            advice = _REMOVE if whole else _ANEW  # else it may be all that there is of the new bytes
            raise ExportError(f"{self.folder}: belongs to another export than {path}. {advice}")


_ANEW = "The refit cannot be finished: export the checkpoint anew with --overwrite"
_REMOVE = "Remove that folder"


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """What the system refuses as an `ExportError`, of `place` where the system does not say which file it is."""
    try:
        yield
    except OSError as error:
        raise write_error(Path(error.filename2 or error.filename or place), error) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What cannot be read now, though it may well be there, as an `ExportError`; what is missing stays an `OSError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ExportError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


@contextmanager
def _going_on(output: Path) -> Iterator[None]:
    """Tell what goes on with a refit that fails once it is committed, unless nothing does."""
    try:
        yield
    except ExportError as error:
        if _ANEW in str(error) or _REMOVE in str(error):
            raise
        message = f"{error}\nthe refit is not finished: dist-export refit - {output} goes on with it"
        raise ExportError(message) from error


def digest_of(path: Path) -> str:
    """SHA-256 of a small file, hexadecimal; ``""`` where there is none. Raises `ExportError` when it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error


def apply(output: Path, group: Group, *, grave: Path, step: str) -> None:
    """Bring an output to what its redo folder says. All ranks call it; `step` names it in the group."""
    with _going_on(output):
        _apply(Redo(output), group, grave, step)


def _apply(redo: Redo, group: Group, grave: Path, step: str) -> None:
    watcher = Watcher(group)
    group.enter_phase("apply")
    if group.rank == 0:
        redo.withhold_configurations()
    group.barrier(f"{step}: configurations withheld")
    mine = redo.logs[group.rank :: group.world_size]
    group.progress.add(total=sum(redo.commit.logs[name] for name in mine))
    redo.write_blocks(mine, watcher.progress)
    group.barrier(f"{step}: blocks written")
    if group.rank == 0:
        redo.place_documents()
        redo.remove(grave)
    group.barrier(f"{step}: applied")


def finish_interrupted(output: Path, group: Group) -> bool:
    """Finish a refit of `output` that was stopped while it was applied. All ranks call it.

    Returns whether there was one. Raises `ExportError` when it is another run's, or damaged.
    """
    found = group.broadcast("unfinished refit", b"1" if group.rank == 0 and (output / REFIT).is_dir() else b"0")
    if found != b"1":
        return False
    staging = None
    try:
        if group.rank == 0:
            staging = publication.Staging(output)
        group.barrier("lease of the unfinished refit")
        if not (output / REFIT).is_dir():
            raise ExportError(f"{output}: another run has just finished its refit; start again")
        grave = publication.staging_folder(output) / "applied"
        apply(output, group, grave=grave, step="unfinished refit")
    finally:
        if staging is not None:  # an export that was stopped has left its work there
            staging.abandon(keep=read_fingerprint(staging.folder) is not None)
    return True


def _read(path: Path) -> Commit:
    try:
        with _reading(path):
            found = json.loads(path.read_text())
        version = found["format_version"]
        record = Commit(
            tuple(map(str, found["files"])),
            {str(name): int(size) for name, size in found["logs"].items()},
            tuple(FolderChange(**{**each, "remove": tuple(map(str, each["remove"]))}) for each in found["folders"]),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # it is missing
        raise ExportError(f"{path}: cannot be read: {error}. {_ANEW}") from error
    if version != FORMAT_VERSION:
        raise ExportError(f"{path}: format {version}, this release knows {FORMAT_VERSION}; finish with the other one")
    for name, size in record.logs.items():
        for suffix in (BLOCKS, INDEX):
            _check_name(f"{name}{suffix}", path)
        blocks = path.parent / LOGS / f"{name}{BLOCKS}"
        with _reading(blocks):
            is_whole = blocks.is_file() and blocks.stat().st_size == size
        if not is_whole:
            raise ExportError(f"{blocks}: is missing or not of {size} bytes. {_ANEW}")
    for change in record.folders:
        for name in change.remove:
            _check_name(name, path)
    return record


def _check_name(name: str, where: Path) -> None:
    """A file or folder directly in another one, or that one itself."""
    parts = PurePosixPath(name).parts
    if name != "." and (len(parts) != 1 or parts[0] in ("..", "/")):
        raise ExportError(f"{where}: names {name!r}, which is no file of an export. {_ANEW}")


def _check_file(output: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    path = output / name
    try:
        with _reading(path):
            is_file = stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        is_file = False
    if not parts or len(parts) > 2 or parts[0] in ("/", "..") or ".." in parts or not is_file:
        raise ExportError(f"{output / REFIT}: {name!r} is no file of this export. {_ANEW}")
