"""The journal: which byte runs of the staged files have been written, so that a killed run can go on.

Each process appends to a file of its own in the staging folder. A journal promises nothing by itself:
a resumed run reads every run back and compares its checksum before it believes it, so a crash of the
machine that lost written pages costs work and never correctness.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock

from isal.isal_zlib import crc32

from dist_export.convert.ledger import Run, TensorKey, merged
from dist_export.convert.outputs import write_error
from dist_export.errors import ExportError

FOLDER = "journal"
FINGERPRINT = "job.json"
FLUSH_EVERY_S = 0.1  # work lost by a kill, at most

_READ_BYTES = 1 << 20
_LINE = re.compile(rb"\d{1,9} \d{1,9} \d{1,18} \d{1,18} \d{1,10}\n")


class Journal:
    """Appends runs to one process's journal file. `note` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a")
        except OSError as error:
            raise write_error(path, error) from error
        self._lock = Lock()
        self._lines: list[str] = []
        self._flushed = time.monotonic()

    def note(self, key: TensorKey, run: Run) -> None:
        """Remember that a run has been written."""
        with self._lock:
            self._lines.append(f"{key[0]} {key[1]} {run[0]} {run[1]} {run[2]}\n")
            if time.monotonic() - self._flushed >= FLUSH_EVERY_S:
                self._flush()

    def close(self) -> None:
        """Write what is left and close. Raises nothing: what is not noted is done again, no more."""
        with self._lock, contextlib.suppress(ExportError, OSError):
            try:
                self._flush()
            finally:
                self._file.close()

    def _flush(self) -> None:
        lines, self._lines, self._flushed = self._lines, [], time.monotonic()
        try:
            self._file.write("".join(lines))
            self._file.flush()
        except OSError as error:
            raise write_error(Path(self._file.name), error) from error


def read_journals(folder: Path) -> dict[TensorKey, list[Run]]:
    """All runs in the journals of a staging folder; a line cut off by a kill is passed over."""
    runs: dict[TensorKey, list[Run]] = {}
    for path in sorted((folder / FOLDER).glob("*.txt")):
        for line in path.read_bytes().splitlines(keepends=True):
            if _LINE.fullmatch(line):
                file, index, offset, length, checksum = map(int, line.split())
                runs.setdefault((file, index), []).append((offset, length, checksum))
    return runs


def confirmed(path: Path, start: int, num_bytes: int, runs: Iterable[Run]) -> Iterator[Run]:
    """Those of a tensor's runs whose bytes in `path` have the noted checksum.

    The tensor has `num_bytes` bytes and begins at `start`. Overlapping runs (of an earlier resume) yield each
    byte once.
    """
    end = 0
    with path.open("rb") as file:
        for offset, length, checksum in sorted(set(runs)):
            if offset < end or not 0 < length <= num_bytes - offset:
                continue
            if _checksum(file.fileno(), start + offset, length) != checksum:
                continue
            end = offset + length
            yield offset, length, checksum


def _checksum(descriptor: int, offset: int, length: int) -> int | None:
    checksum = 0
    while length:
        data = os.pread(descriptor, min(length, _READ_BYTES), offset)
        if not data:
            return None
        checksum = int(crc32(data, checksum))
        offset, length = offset + len(data), length - len(data)
    return checksum


class Done:
    """Byte ranges of output tensors that need not be written again."""

    def __init__(self, runs: Mapping[TensorKey, Iterable[Run]]) -> None:
        self._ranges = {key: [(o, o + n) for o, n, _ in merged(each)] for key, each in runs.items()}

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def missing(self, key: TensorKey, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts (offset, length) of a range that are not done."""
        parts, end = [], offset + length
        for low, high in self._ranges.get(key, ()):
            if high <= offset:
                continue
            if low >= end:
                break
            if low > offset:
                parts.append((offset, low - offset))
            offset = max(offset, high)
        if offset < end:
            parts.append((offset, end - offset))
        return parts


def write_fingerprint(folder: Path, fingerprint: Mapping[str, object]) -> None:
    """Say what a staging folder is being filled with."""
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FINGERPRINT).write_text(json.dumps(fingerprint, indent=1) + "\n")
    except OSError as error:
        raise write_error(folder / FINGERPRINT, error) from error


def remove_journals(folder: Path) -> None:
    """Remove everything of this module from a finished folder."""
    shutil.rmtree(folder / FOLDER)
    (folder / FINGERPRINT).unlink()


def read_fingerprint(folder: Path) -> dict[str, object] | None:
    """What `write_fingerprint` said, or None."""
    try:
        value = json.loads((folder / FINGERPRINT).read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
