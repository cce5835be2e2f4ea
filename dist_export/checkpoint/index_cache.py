"""A chunk table kept in a file, only where the user asks for it: parsing large metadata takes seconds.

The file holds the table and the sizes and times of every file that it describes; when one of them differs, or
anything in the file is not as it should be, the metadata is read again and the file is replaced.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import ExportError

_MAGIC = b"dist_export index 1\n"
_METADATA = (".metadata", "weights/.metadata", "metadata.json")


def cached_index(folder: Path, cache: Path, read: Callable[[Path], CheckpointIndex]) -> CheckpointIndex:
    """The table of `folder` out of `cache` when that is of the files as they are now; else read, and kept there.

    Raises what `read` raises, and `ExportError` when the cache cannot be written.
    """
    found = _load(folder, cache)
    if found is not None:
        return found
    index = read(folder)
    stamps = json.dumps(_stamps(folder, index)).encode()
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(_MAGIC + struct.pack("<Q", len(stamps)) + stamps + index.to_bytes())
        os.replace(partial, cache)
    except OSError as error:
        raise ExportError(f"--index-cache {cache}: cannot write: {error.strerror}") from error
    return index


def _load(folder: Path, cache: Path) -> CheckpointIndex | None:
    try:
        data = cache.read_bytes()
        start = len(_MAGIC) + 8
        if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
            return None
        (length,) = struct.unpack_from("<Q", data, len(_MAGIC))
        stamps = json.loads(data[start : start + length])
        index = CheckpointIndex.from_buffer(memoryview(data)[start + length :], origin=str(cache))
        return index if stamps == _stamps(folder, index) else None
    except (OSError, ValueError, ExportError):
        return None


def _stamps(folder: Path, index: CheckpointIndex) -> dict[str, list[int]]:
    """Path -> size and modification time (ns) of what the table was made of and of what it describes."""
    paths = [folder / name for name in _METADATA] + [index.path(number) for number in range(len(index.files))]
    stats = {str(path): path.stat() for path in paths if path.exists()}
    return {path: [status.st_size, status.st_mtime_ns] for path, status in stats.items()}
