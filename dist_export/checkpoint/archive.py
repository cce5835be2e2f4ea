"""Tar archives read in place: where the bytes of every member lie.

Only what ``tarfile`` writes for plain files and folders is accepted (ustar, GNU long names and sizes, pax paths and
sizes); links, devices and sparse files are refused, as are names that lead out of the archive. Nothing is unpacked,
except that a compressed archive is decompressed to one temporary file without a name.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from msgspec import Struct

from dist_export.checkpoint.file_tree import FileTree, StoredFile
from dist_export.errors import ExportError

_BLOCK = 512
_COPY_BYTES = 1 << 20
_MOST_MEMBERS = 1 << 20
_MOST_EXTENDED = 1 << 16  # bytes of one long name or pax header
_MOST_RATIO = 100  # decompressed over compressed; weights reach 2, and deflate can claim 1032
_FREE_SHARE = 0.9  # of the temporary file system
_GZIP = b"\x1f\x8b"
_KINDS = {b"1": "a link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "sparse"}

_unpacked: dict[tuple[Path, int, int], tuple[IO[bytes], Path]] = {}
"""(archive, its size, its time) -> the temporary file with its decompressed content, kept open, and its path."""


def is_tar(path: Path) -> bool:
    """Whether a file is a tar archive, perhaps compressed with gzip. Reads one block."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(_BLOCK)
            if start.startswith(_GZIP):
                with gzip.open(path) as stream:
                    start = stream.read(_BLOCK)
    except (OSError, EOFError, zlib.error):
        return False
    return len(start) == _BLOCK and _checksum_fits(start)


def open_tar(path: Path) -> FileTree:
    """The files of an archive. A compressed one is decompressed to a temporary file that ends with this process.

    Raises `ExportError` for archives that are cut or malformed, whose members are not plain files in folders below the
    archive's own, or that would not fit into the temporary file system.
    """
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == _GZIP
        plain = _decompressed(path) if compressed else path
        with plain.open("rb") as file:
            files = {member.name: member.file for member in _members(file, str(path))}
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror or error}") from error
    return FileTree(plain, files)


class _Member(Struct, frozen=True):
    name: str
    file: StoredFile


class _Extended(Struct):
    """What a header in front says about the next member."""

    name: str | None = None
    size: int | None = None


def _members(file: BinaryIO, origin: str) -> Iterator[_Member]:
    """All plain files. Headers are checked one after the other; data is skipped."""
    end, position, extended, seen = file.seek(0, os.SEEK_END), 0, _Extended(), set()
    for _ in range(_MOST_MEMBERS):
        header = _read(file, position, min(_BLOCK, end - position))
        if not header.strip(b"\0"):  # the closing block, or an archive that ends without one
            return
        if len(header) < _BLOCK or not _checksum_fits(header):
            raise ExportError(f"{origin}: no tar header at byte {position}: the archive is cut or damaged")
        kind, size = header[156:157], _number(header[124:136], origin)
        data = position + _BLOCK
        if kind in (b"x", b"g", b"L"):
            if size > _MOST_EXTENDED:
                raise ExportError(f"{origin}: a header of {size} bytes at {position}, accepted: {_MOST_EXTENDED}")
            _extend(extended, kind, _read(file, data, size), origin)
        else:
            size = size if extended.size is None else extended.size
            name = _checked_name(extended.name or _header_name(header), origin)
            extended = _Extended()
            if kind == b"5":
                size = 0
            elif kind not in (b"0", b"\0", b"7"):
                raise ExportError(f"{origin}: {name} is {_KINDS.get(kind, f'of tar type {kind!r}')}; only plain files "
                                  "and folders are accepted")
            elif name in seen:
                raise ExportError(f"{origin}: {name} is there twice")
            else:
                seen.add(name)
                if data + size > end:
                    raise ExportError(f"{origin}: {name} needs {data + size} bytes, the archive has {end}: it is cut")
                yield _Member(name, StoredFile(".", data, size))
        position = data + -(-size // _BLOCK) * _BLOCK
    raise ExportError(f"{origin}: has more than {_MOST_MEMBERS} members")


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    return os.pread(file.fileno(), max(size, 0), position)


def _checksum_fits(header: bytes) -> bool:
    """The sum of all bytes, those of the sum itself counted as spaces."""
    try:
        said = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return said == sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")


def _number(field: bytes, origin: str) -> int:
    """Octal digits, or from 8 GiB on a binary number behind a set bit."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << 95) - 1)
        if field[0] == 0xFF or value >= 1 << 62:
            raise ExportError(f"{origin}: a member of an impossible size")
        return value
    digits = field.strip(b" \0") or b"0"
    if digits.strip(b"01234567"):
        raise ExportError(f"{origin}: a member whose size is {field!r}")
    return int(digits, 8)


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _extend(extended: _Extended, kind: bytes, data: bytes, origin: str) -> None:
    if kind == b"L":
        extended.name = data.split(b"\0")[0].decode(errors="replace")
        return
    for key, value in _pax_records(data, origin):
        if key == "path" and kind == b"x":
            extended.name = value
        elif key == "size" and kind == b"x":
            if not value.isdecimal() or len(value) > 18:
                raise ExportError(f"{origin}: a member whose size is {value!r:.40}")
            extended.size = int(value)
        elif key in ("path", "size") or key.startswith("GNU.sparse"):
            raise ExportError(f"{origin}: the header {key} is not one that is accepted")


def _pax_records(data: bytes, origin: str) -> Iterator[tuple[str, str]]:
    """Records ``LENGTH KEY=VALUE\\n``."""
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = data[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n") or length > len(data):
            raise ExportError(f"{origin}: a pax header that is malformed")
        yield key.decode(errors="replace"), value[:-1].decode(errors="replace")
        data = data[length:]


def _checked_name(name: str, origin: str) -> str:
    """A name below the archive's own folder, without ``./``."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise ExportError(f"{origin}: {name!r:.200} leads out of the archive")
    return "/".join(parts)


def _decompressed(path: Path) -> Path:
    """A file with the content of a gzip file, made once per process (and its forks).

    It has no name in a file system, so nothing is left behind whatever happens to this process: others of the machine
    find it under ``/proc`` while this one lives.
    """
    status = path.stat()
    key = (path.absolute(), status.st_size, status.st_mtime_ns)
    if key not in _unpacked:
        target = tempfile.TemporaryFile(prefix="dist_export-")  # noqa: SIM115  # open while the process lives
        try:
            free = shutil.disk_usage(target.fileno()).free
            _decompress(path, target, min(status.st_size * _MOST_RATIO, int(free * _FREE_SHARE)))
        except BaseException:
            target.close()
            raise
        os.utime(target.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))  # a resumed export sees the same source
        _unpacked[key] = target, Path(f"/proc/{os.getpid()}/fd/{target.fileno()}")
    return _unpacked[key][1]


def _decompress(path: Path, target: IO[bytes], most: int) -> None:
    """Write at most `most` bytes. ``gzip`` compares checksum and size with what the file declares at its end."""
    num_bytes = 0
    try:
        with gzip.open(path) as stream:
            while data := stream.read(_COPY_BYTES):
                num_bytes += len(data)
                if num_bytes > most:
                    raise ExportError(
                        f"{path}: decompresses to more than {most} bytes, which is {_MOST_RATIO} times its size "
                        f"or more than {tempfile.gettempdir()} has room for; decompress it where there is room "
                        "(gunzip) and name the result, or set TMPDIR"
                    )
                target.write(data)
        target.flush()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ExportError(f"{path}: cannot be decompressed: {error}") from error
