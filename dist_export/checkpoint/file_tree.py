"""The files of a folder or of an archive under one interface: relative name -> where its bytes lie."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from dist_export.errors import ExportError

MOST_FILES = 1 << 22
"""A zarr checkpoint of a large model has some hundred thousand."""
_COPY_BYTES = 1 << 20


class StoredFile(Struct, frozen=True):
    """A file, or the range of an archive that is one."""

    name: str
    """Of the file that holds the bytes, relative to `FileTree.root`; ``.`` for an archive, which is the root itself."""
    base: int  # bytes from the start of that file
    size: int  # bytes


class FileTree(Struct, frozen=True):
    """All files below a folder, or below a folder of an archive."""

    root: Path
    """The folder or the archive."""
    files: Mapping[str, StoredFile]
    """Name with slashes, relative to the folder -> the file."""

    @classmethod
    def of_folder(cls, folder: Path) -> FileTree:
        """All files below `folder`; links are followed for files, not for folders."""
        return cls(folder, dict(_walk(folder)))

    def below(self, folder: str) -> FileTree:
        """The part in a subfolder, under names relative to it."""
        start = folder + "/"
        return FileTree(self.root, {n.removeprefix(start): f for n, f in self.files.items() if n.startswith(start)})

    def where(self, name: str) -> str:
        """A file's name for messages."""
        return f"{self.root}: {name}"

    def path(self, file: StoredFile) -> Path:
        """What to open to read a file, from `StoredFile.base` on."""
        return self.root / file.name

    def read(self, name: str, *, most: int) -> bytes:
        """A whole small file. `ExportError` when it is missing, cannot be read or has more than `most` bytes."""
        file = self._file(name, most)
        try:
            with self.path(file).open("rb") as stream:
                data = os.pread(stream.fileno(), file.size, file.base)
        except OSError as error:
            raise ExportError(f"{self.where(name)}: {error.strerror}") from error
        if len(data) != file.size:
            raise ExportError(f"{self.where(name)}: {len(data)} bytes could be read, {file.size} expected")
        return data

    def copy(self, name: str, target: Path, *, most: int) -> None:
        """Copy a file out, part by part. `ExportError` as `read` raises it."""
        file = self._file(name, most)
        done = 0
        try:
            with self.path(file).open("rb") as stream, target.open("xb") as output:
                while done < file.size:
                    data = os.pread(stream.fileno(), min(_COPY_BYTES, file.size - done), file.base + done)
                    if not data:
                        raise ExportError(f"{self.where(name)}: {done} bytes could be read, {file.size} expected")
                    done += output.write(data)
        except OSError as error:
            raise ExportError(f"{self.where(name)}: cannot be copied to {target.parent}: {error.strerror}") from error

    def _file(self, name: str, most: int) -> StoredFile:
        file = self.files.get(name)
        if file is None:
            raise ExportError(f"{self.where(name)} is missing")
        if file.size > most:
            raise ExportError(f"{self.where(name)} has {file.size} bytes, at most {most} are accepted")
        return file


def _walk(folder: Path) -> Iterator[tuple[str, StoredFile]]:
    count = 0

    def failed(error: OSError) -> None:
        raise ExportError(f"{error.filename}: {error.strerror}") from error

    for parent, _, names in os.walk(folder, onerror=failed):
        for name in names:
            path = os.path.join(parent, name)
            relative = os.path.relpath(path, folder)
            count += 1
            if count > MOST_FILES:
                raise ExportError(f"{folder}: has more than {MOST_FILES} files")
            try:
                yield relative, StoredFile(relative, 0, os.stat(path).st_size)
            except OSError as error:
                raise ExportError(f"{path}: {error.strerror}") from error
