"""``torch.save`` files and records: uncompressed zips of one pickle and its storages, located without reading those.

Source of the layout: caffe2/serialize/inline_container.cc and torch/serialization.py. Local headers carry no
sizes (a descriptor follows the data) and padding that aligns the data, so sizes come from the central directory
and positions from the local headers. Storages of 4 GiB and more use zip64.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from dist_export.checkpoint.hand_over import pack, unpack
from dist_export.checkpoint.isolation import IN_PROCESS_BYTES, ParseLimits, in_child
from dist_export.checkpoint.pickles import Record, ScanLimits, TensorRef, load_state_pickle
from dist_export.errors import ExportError

ReadAt = Callable[[int, int], bytes]
"""(offset, size) -> the bytes there, fewer at the end of the file."""

_WINDOW = 4096  # bytes read ahead at both ends of a record: its pickle and headers, its central directory
_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_SATURATED_16, _SATURATED_32 = 0xFFFF, 0xFFFFFFFF
_MAX_DIRECTORY = 1 << 27  # bytes of central directory; an entry takes about 90
_MAX_PICKLE = 1 << 28
_MAX_RECORD_PICKLE = 1 << 16  # that of a single tensor takes about 400 bytes
_MAX_PARSED = 1024  # different pickles of tensor records that are kept, each at most 64 KiB
_ENCRYPTED = 1
_ITEMSIZES = {
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
}


class ZipEntry(Struct, frozen=True):
    """Where the raw bytes of an entry lie."""

    offset: int
    """Absolute, in the same file as the zip's own start."""
    size: int
    crc32: int
    """0 where the writer computed none."""


class SavedState(Struct, frozen=True):
    """The content of a ``torch.save`` file, its tensors as `TensorRef`."""

    value: Any
    storages: dict[str, ZipEntry]
    """Storage key -> raw little-endian bytes."""
    origin: str

    def tensor(self, ref: TensorRef, *, name: str = "") -> TensorRecord:
        """Where the elements of `ref` lie. Raises `ExportError` when not all of them are in the file."""
        return _locate(ref, self.storages, f"{self.origin}: {name}" if name else self.origin)


class TensorRecord(Struct, frozen=True):
    """A strided tensor in a file: element (i, j, …) begins at offset + itemsize * (i * strides[0] + …)."""

    dtype: str
    """As torch prints it without ``torch.``."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    offset: int
    """Absolute byte offset of element 0."""
    storage: ZipEntry


def read_entries(read_at: ReadAt, base: int, length: int, *, origin: str) -> dict[str, ZipEntry]:
    """The entries of the zip in bytes [base, base + length), by name without the top folder (``data/0``).

    `origin` names the file in errors. Raises `ExportError` for anything but a whole zip of stored entries that
    lie inside it side by side, as ``torch.save`` writes it.
    """
    return _Zip(_Source(read_at, base, length, origin)).entries()


def read_state(
    read_at: ReadAt, base: int, length: int, *, origin: str, max_pickle_bytes: int = _MAX_PICKLE
) -> SavedState:
    """The object that ``torch.save`` wrote to bytes [base, base + length); no storage is read.

    Raises `ExportError` as `read_entries` and `load_state_pickle` do, for big-endian storages and for a pickle of
    more than `max_pickle_bytes`.
    """
    return _read_state(_Source(read_at, base, length, origin), max_pickle_bytes)


def read_record(read_at: ReadAt, base: int, length: int, *, origin: str) -> TensorRecord:
    """Where the one tensor in a ``torch.save`` record lies; reads its two ends, at most 4 KiB each.

    Raises `ExportError` as `read_state` does, when the record holds anything but one plain strided tensor, and
    when the storage is not exactly as large as its declared element count or does not hold every element.
    """
    state = _read_state(_Source(read_at, base, length, origin), _MAX_RECORD_PICKLE, _parse_record)
    if type(state.value) is not TensorRef:
        raise ExportError(f"{origin}: holds {_describe(state.value)}, expected one plain tensor")
    if len(state.storages) != 1:
        raise ExportError(f"{origin}: holds {len(state.storages)} storages, expected the one of its tensor")
    return state.tensor(state.value)


def _parse_state(data: bytes, origin: str) -> Any:
    return load_state_pickle(data, origin=origin, limits=ScanLimits(max_bytes=len(data)))


_parsed_records: dict[bytes, TensorRef] = {}


def _parse_record(data: bytes, origin: str) -> Any:
    """As `_parse_state`; the layers of a model have the same few pickles over and over."""
    value = _parsed_records.get(data)
    if value is None:
        value = _parse_state(data, origin)
        if type(value) is TensorRef and len(_parsed_records) < _MAX_PARSED:
            _parsed_records[data] = value
    return value


def _read_state(
    source: _Source, max_pickle_bytes: int, parse: Callable[[bytes, str], Any] = _parse_state
) -> SavedState:
    entries, origin = _Zip(source).entries(), source.origin
    if "data.pkl" not in entries:
        raise ExportError(f"{origin}: a zip without data.pkl, so not written by torch.save")
    _check_byteorder(source, entries)
    value = parse(source.entry(entries["data.pkl"], "data.pkl", max_pickle_bytes), f"{origin}: data.pkl")
    storages = {name[len("data/") :]: entry for name, entry in entries.items() if name.startswith("data/")}
    return SavedState(value, storages, origin)


def _check_byteorder(source: _Source, entries: dict[str, ZipEntry]) -> None:
    """Storages are little-endian unless the file says otherwise; before torch 2.1 it said nothing."""
    if "byteorder" in entries:
        order = source.entry(entries["byteorder"], "byteorder", 16)
        if order != b"little":
            raise ExportError(f"{source.origin}: byte order {order!r}; only little-endian files can be read")


def _describe(value: object) -> str:
    if not isinstance(value, Record):
        return f"a {type(value).__name__}"
    classes = [value.kind, *(arg.kind for arg in value.args if isinstance(arg, type) and issubclass(arg, Record))]
    return f"an object of {' of '.join(classes)}"


def _locate(ref: TensorRef, storages: dict[str, ZipEntry], origin: str) -> TensorRecord:
    entry, storage = storages.get(ref.storage.key), ref.storage
    itemsize = _ITEMSIZES.get(ref.dtype)
    if entry is None:
        raise ExportError(f"{origin}: storage data/{storage.key} is missing")
    if itemsize is None:
        raise ExportError(f"{origin}: unknown element type {ref.dtype}")
    num_bytes = storage.num_elements * (1 if storage.dtype is None else itemsize)
    if num_bytes != entry.size:
        raise ExportError(f"{origin}: storage data/{storage.key} has {entry.size} bytes, {num_bytes} are declared")
    last = ref.storage_offset + sum((size - 1) * step for size, step in zip(ref.shape, ref.strides, strict=True))
    if math.prod(ref.shape) and (last + 1) * itemsize > entry.size:
        raise ExportError(
            f"{origin}: a {ref.dtype} tensor of shape {list(ref.shape)}, strides {list(ref.strides)} and offset "
            f"{ref.storage_offset} does not fit into its storage of {entry.size} bytes"
        )
    return TensorRecord(ref.dtype, ref.shape, ref.strides, entry.offset + ref.storage_offset * itemsize, entry)


class _Source(Struct):
    """Reads within one zip. Positions are relative to its start; both ends are read once and kept."""

    read_at: ReadAt
    base: int
    length: int
    origin: str
    windows: list[tuple[int, bytes]] = field(default_factory=list)

    def open(self) -> None:
        """Read both ends."""
        if self.length <= 2 * _WINDOW:
            self.windows = [(0, self._read(0, self.length))]
        else:
            tail = self.length - _WINDOW
            self.windows = [(0, self._read(0, _WINDOW)), (tail, self._read(tail, _WINDOW))]

    def read(self, pos: int, size: int) -> bytes:
        """`size` bytes at `pos`; the caller has checked that they lie inside the zip."""
        for start, window in self.windows:
            if start <= pos and pos + size <= start + len(window):
                return window[pos - start : pos - start + size]
        return self._read(pos, size)

    def _read(self, pos: int, size: int) -> bytes:
        try:
            data = self.read_at(self.base + pos, size)
        except OSError as error:
            raise ExportError(f"{self.origin}: cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise ExportError(f"{self.origin}: is cut: {size} bytes wanted at {self.base + pos}, {len(data)} there")
        return data

    def entry(self, entry: ZipEntry, name: str, most: int) -> bytes:
        """The bytes of a small entry, checked against its CRC where it has one."""
        if entry.size > most:
            raise ExportError(f"{self.origin}: {name} has {entry.size} bytes, at most {most} are accepted")
        data = self.read(entry.offset - self.base, entry.size)
        if entry.crc32 and zlib.crc32(data) != entry.crc32:
            raise ExportError(f"{self.origin}: {name} is damaged (its CRC-32 does not match)")
        return data


class _Listed(Struct, frozen=True):
    """An entry of the central directory; `header` is the position of its local header."""

    name: bytes
    header: int
    size: int
    crc32: int


class _Zip(Struct):
    source: _Source

    def entries(self) -> dict[str, ZipEntry]:
        """All entries, checked."""
        source = self.source
        source.open()
        if source.length < _END.size or source.read(0, 4) != b"PK\x03\x04":
            raise self._error("is not a zip as torch.save writes it since torch 1.6")
        count, start, size = self._directory()
        listed = sorted(self._listed(count, start, size), key=lambda entry: entry.header)
        found: dict[str, ZipEntry] = {}
        folders, free = set(), 0
        for entry in listed:
            data = self._data(entry, free, start)
            free = data + entry.size
            folder, name = self._name(entry.name)
            folders.add(folder)
            if name in found:
                raise self._error(f"has two entries {name!r}")
            found[name] = ZipEntry(source.base + data, entry.size, entry.crc32)
        if len(folders) > 1:
            raise self._error(f"has {len(folders)} top folders, torch.save writes one")
        return found

    def _error(self, reason: str) -> ExportError:
        return ExportError(f"{self.source.origin}: {reason}")

    def _directory(self) -> tuple[int, int, int]:
        """Count, position and size of the central directory, which must end where the end records begin."""
        end = self.source.length - _END.size
        signature, disk, first, here, count, size, start, comment = _END.unpack(self.source.read(end, _END.size))
        if signature != b"PK\x05\x06" or comment:
            raise self._error("does not end as a zip does: it is cut, or more was written after it")
        locator = end - _LOCATOR.size
        if locator >= 0 and self.source.read(locator, 4) == b"PK\x06\x07":
            end, here, count, size, start = self._directory_64(locator, (count, size, start))
        elif _SATURATED_16 in (here, count) or _SATURATED_32 in (size, start):
            raise self._error("is a zip64 without its end record")
        if disk or first or here != count or start + size != end or size > _MAX_DIRECTORY or count * 46 > size:
            raise self._error(f"has a central directory that cannot be: {count} entries, {size} bytes at {start}")
        return count, start, size

    def _directory_64(self, locator: int, small: tuple[int, int, int]) -> tuple[int, int, int, int, int]:
        _, disk, position, disks = _LOCATOR.unpack(self.source.read(locator, _LOCATOR.size))
        if disk or disks > 1 or position != locator - _END_64.size:
            raise self._error("has a zip64 end record that is not where it should be")
        record = _END_64.unpack(self.source.read(position, _END_64.size))
        signature, _, _, _, disk, first, here, count, size, start = record
        if signature != b"PK\x06\x06" or disk or first:
            raise self._error("has a malformed zip64 end record")
        most = (_SATURATED_16, _SATURATED_32, _SATURATED_32)
        for value, short, saturated in zip((count, size, start), small, most, strict=True):
            if short not in (value, saturated):
                raise self._error("has two end records that contradict each other")
        return position, here, count, size, start

    def _listed(self, count: int, start: int, size: int) -> list[_Listed]:
        directory = self.source.read(start, size)
        listed, pos = [], 0
        for _ in range(count):
            if pos + _CENTRAL.size > size:
                raise self._error("has a central directory that is cut")
            fields = _CENTRAL.unpack_from(directory, pos)
            name_end = pos + _CENTRAL.size + fields[10]
            extra_end = name_end + fields[11]
            if fields[0] != b"PK\x01\x02" or extra_end + fields[12] > size:
                raise self._error("has a malformed central directory")
            name = directory[pos + _CENTRAL.size : name_end]
            listed.append(self._central(fields, name, directory[name_end:extra_end]))
            pos = extra_end + fields[12]
        if pos != size:
            raise self._error("has a central directory with more than its entries")
        return listed

    def _central(self, fields: tuple[Any, ...], name: bytes, extra: bytes) -> _Listed:
        flags, method, crc32, packed, size, disk, header = (fields[i] for i in (3, 4, 7, 8, 9, 13, 16))
        if _SATURATED_32 in (packed, size, header):
            size, packed, header = self._wide((size, packed, header), extra)
        if method or packed != size or flags & _ENCRYPTED or disk:
            raise self._error(f"entry {name!r} is compressed or encrypted, which torch.save does not do")
        return _Listed(name, header, size, crc32)

    def _wide(self, values: tuple[int, int, int], extra: bytes) -> list[int]:
        """The zip64 extra field (id 1) holds, in this order, those of the values that are saturated."""
        pos, wide = 0, b""
        while pos + 4 <= len(extra):
            kind, size = struct.unpack_from("<HH", extra, pos)
            if kind == 1:
                wide = extra[pos + 4 : pos + 4 + size]
                break
            pos += 4 + size
        numbers = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
        found = [next(numbers, -1) if value == _SATURATED_32 else value for value in values]
        if -1 in found:
            raise self._error("has a zip64 entry without its sizes")
        return found

    def _data(self, entry: _Listed, free: int, most: int) -> int:
        """Position of an entry's data, which must lie in [free, most)."""
        if not free <= entry.header <= most - _LOCAL.size - len(entry.name):
            raise self._error(f"entry {entry.name!r} overlaps another or lies outside of the file")
        header = self.source.read(entry.header, _LOCAL.size + len(entry.name))
        signature, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack_from(header)
        if signature != b"PK\x03\x04" or header[_LOCAL.size :] != entry.name or name_length != len(entry.name):
            raise self._error(f"entry {entry.name!r} does not begin with its header")
        data: int = entry.header + _LOCAL.size + name_length + extra_length
        if method or flags & _ENCRYPTED or data + entry.size > most:
            raise self._error(f"entry {entry.name!r} of {entry.size} bytes does not fit into the file")
        return data

    def _name(self, raw: bytes) -> tuple[str, str]:
        try:
            folder, slash, name = raw.decode().partition("/")
        except UnicodeDecodeError:
            slash = ""
        if not slash or not name:
            raise self._error(f"has an entry {raw!r}, which torch.save does not write")
        return folder, name


def load_object(path: Path, base: int, length: int) -> Any:
    """The object that ``torch.save`` wrote to a range of a file, as `read_state` gives it.

    A large one is parsed by a process of its own (`isolation`). Raises `ExportError` as `read_state` does and for what
    that process may not cost.
    """
    if length <= IN_PROCESS_BYTES:
        return _object_in(path, base, length)
    limits = ParseLimits.for_size(min(length, _MAX_PICKLE))
    (result,) = in_child(packed_object, [[str(path.absolute()), base, length]], names=[str(path)], limits=limits)
    return unpack(result, origin=str(path))


def packed_object(path: str, base: int, length: int) -> bytes:
    """In the child of `isolation`: the object in a range of a file."""
    return pack(_object_in(Path(path), base, length), origin=path)


def _object_in(path: Path, base: int, length: int) -> Any:
    try:
        with path.open("rb") as file:
            return read_state(lambda at, size: os.pread(file.fileno(), size, at), base, length, origin=str(path)).value
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
