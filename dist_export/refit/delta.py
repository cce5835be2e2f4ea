"""A delta: the changed tensors of a refit as safetensors files, with an index of what they belong to.

``delta.json`` names, per target, the export that the delta was made against (`content_digest` of its tensors), the one
that it leads to, and the tensors of each file with their checksums. ``documents`` holds the manifest, configuration and
other documents of the new export.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32
from msgspec import Struct, field, to_builtins

import dist_export
from dist_export.convert.outputs import write_error
from dist_export.errors import ExportError
from dist_export.plan.shard import PlannedTensor
from dist_export.refit.blocks import NewContent, sync, write_all
from dist_export.runtime import publication
from dist_export.runtime.watch import Watcher
from dist_export.tensors.safetensors_format import build_header

INDEX = "delta.json"
DOCUMENTS = "documents"
FORMAT_VERSION = 1
_COPY_BYTES = 4 << 20


class DeltaFile(Struct, frozen=True):
    """A file of changed tensors."""

    number: int
    """Of the whole file, in the job."""
    num_bytes: int
    tensors: dict[str, dict[str, object]]
    """Name -> dtype, shape and CRC-32 of the new bytes."""


class DeltaFolder(Struct, frozen=True):
    """One target of a delta."""

    folder: str
    """Within the delta and within the output: ``.``, or the name of a target."""
    target: str
    base: Mapping[str, object]
    """``iteration`` and ``content`` of the export that the delta applies to."""
    new: Mapping[str, object]
    """Those of the export that it leads to."""
    files: Mapping[str, Mapping[str, Any]]
    """Per file its size and its tensors."""
    documents: Mapping[str, str] = field(default_factory=dict)
    """Name -> SHA-256."""


class Delta(Struct, frozen=True):
    """A delta folder's index."""

    path: Path
    folders: tuple[DeltaFolder, ...]

    def write(self, folder: Path) -> None:
        """Write the index into a delta's folder. Raises `ExportError`."""
        plain = {
            "format_version": FORMAT_VERSION,
            "producer": {"name": "dist_export", "version": dist_export.__version__},
            "folders": [to_builtins(each) for each in self.folders],
        }
        publication.write_file(folder / INDEX, (json.dumps(plain, indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Delta:
        """The index of a delta folder. Raises `ExportError` when it cannot be one."""
        index = path / INDEX
        try:
            found = json.loads(index.read_text(encoding="utf-8"))
            folders = tuple(_folder(each) for each in found["folders"])
            version = found["format_version"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ExportError(f"{index}: is no index of a delta: {error}") from error
        if version != FORMAT_VERSION:
            raise ExportError(f"{index}: format {version}, this release of dist_export knows {FORMAT_VERSION}")
        return cls(path, folders)


def is_delta(path: Path) -> bool:
    """Whether a folder is a delta rather than a checkpoint."""
    return (path / INDEX).is_file()


def _folder(found: Mapping[str, Any]) -> DeltaFolder:
    folder = DeltaFolder(
        str(found["folder"]),
        str(found["target"]),
        dict(found["base"]),
        dict(found["new"]),
        {str(name): dict(entry) for name, entry in found["files"].items()},
        {str(name): str(digest) for name, digest in found["documents"].items()},
    )
    for entry in folder.files.values():
        if not isinstance(entry["tensors"], dict) or not isinstance(entry["num_bytes"], int):
            raise TypeError("an entry of a file is incomplete")
    if not all(isinstance(end.get("content"), str) for end in (folder.base, folder.new)):
        raise TypeError("it does not say what it was made against, or leads to")
    for name in (folder.folder, *folder.files, *folder.documents):
        if name != "." and (Path(name).name != name or name.startswith(".")):
            raise ValueError(f"{name!r} is no name of a file")
    return folder


def write_delta_file(
    path: Path, number: int, tensors: Sequence[PlannedTensor], data_start: int, content: NewContent, watcher: Watcher
) -> DeltaFile:
    """Write `tensors` of the new content of file `number`, whose data begins at `data_start`, as a safetensors file."""
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    offset, table = 0, []
    for tensor in ordered:
        table.append((tensor.name, tensor.dtype, tensor.shape, offset))
        offset += tensor.num_bytes
    header = build_header(table, metadata={"format": "pt"})
    position, entries, buffer = len(header), {}, memoryview(bytearray(_COPY_BYTES))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        write_all(descriptor, 0, memoryview(header), path)
        for tensor in ordered:
            checksum = 0
            for part in _parts(content, data_start + tensor.offset, tensor.num_bytes, buffer):
                checksum = int(crc32(part, checksum))
                write_all(descriptor, position, part, path)
                position += part.nbytes
                watcher.progress(part.nbytes, 0)
            entry: dict[str, object] = {"dtype": tensor.dtype.name, "shape": list(tensor.shape)}
            entries[tensor.name] = {**entry, "crc32": f"{checksum:08x}"}
        sync(descriptor, path)
    finally:
        os.close(descriptor)
    return DeltaFile(number, position, entries)


def _parts(content: NewContent, start: int, num_bytes: int, buffer: memoryview) -> Iterable[memoryview]:
    for first in range(0, num_bytes, buffer.nbytes):
        part = buffer[: min(buffer.nbytes, num_bytes - first)]
        content.read(start + first, part)
        yield part


def document_digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the documents in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
