"""``torch.save`` files from before torch 1.6 (or saved with ``_use_new_zipfile_serialization=False``).

Source of the layout: torch/serialization.py, ``_legacy_save``. Pickles follow each other: a magic number, the
protocol number 1001, facts about the machine, the object, the list of storage keys; then, in the order of that
list, each storage as an int64 count of elements and its raw bytes. There is no index and no checksum, so storages
are found by walking their counts; their element types are those that the object's pickle gives them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from dist_export.checkpoint.pickles import Record, ScanLimits, StorageRef, TensorRef, load_state_pickle, prescan
from dist_export.checkpoint.torch_save import ReadAt, SavedState, ZipEntry
from dist_export.errors import ExportError
from dist_export.tensors.dtypes import dtype_by_name

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled magic number that such a file begins with."""
_PROTOCOL = 1001
_FIRST_WINDOW = 1 << 16  # bytes: most pickles are smaller; each next try takes 16 times as many
_COUNT = struct.Struct("<q")


def read_unzipped_state(read_at: ReadAt, length: int, *, origin: str, max_pickle_bytes: int) -> SavedState:
    """The object in a file of `length` bytes that begins with `MAGIC`; no storage is read.

    Raises `ExportError` for anything but the five pickles and whole storages up to the last byte, for big-endian
    files, for pickles of more than `max_pickle_bytes` and for all that `load_state_pickle` refuses.
    """
    reader = _Reader(read_at, length, origin, max_pickle_bytes)
    reader.pickle("magic number")
    if reader.pickle("protocol number") != _PROTOCOL:
        raise ExportError(f"{origin}: not of the protocol {_PROTOCOL}, the only one that torch has written")
    machine = reader.pickle("description of the machine")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ExportError(f"{origin}: not from a little-endian machine; only such files can be read")
    value = reader.pickle("object")
    keys = reader.pickle("list of storages")
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise ExportError(f"{origin}: the list of storage keys is no list of strings; the file is damaged")
    return SavedState(value, reader.storages(keys, {ref.key: ref for ref in storages_in(value)}), origin)


def storages_in(value: object) -> Iterator[StorageRef]:
    """Every storage that a loaded state refers to, repeated where it is shared."""
    for found in _leaves(value):
        yield found.storage if isinstance(found, TensorRef) else found


def tensors_in(value: object) -> Iterator[TensorRef]:
    """Every tensor in a loaded state, however deep; one that is there under two names comes once."""
    return (found for found in _leaves(value) if isinstance(found, TensorRef))


def _leaves(value: object) -> Iterator[TensorRef | StorageRef]:
    """Walks without recursion, each object once: a pickle may nest and share as it likes."""
    pending: list[Any] = [value]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, TensorRef | StorageRef | dict | list | tuple | Record):
            if id(item) in seen:
                continue
            seen.add(id(item))
        if isinstance(item, TensorRef | StorageRef):
            yield item
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
        elif isinstance(item, Record):
            pending.extend((item.args, item.kwargs, item.state, item.items))


class _Reader:
    """Takes one pickle after the other, then the storages."""

    def __init__(self, read_at: ReadAt, length: int, origin: str, max_pickle_bytes: int) -> None:
        self._read_at, self._length, self._origin = read_at, length, origin
        self._max_pickle_bytes = max_pickle_bytes
        self._position = 0

    def pickle(self, what: str) -> Any:
        """The next pickle's object."""
        origin = f"{self._origin}: {what}"
        data = self._next_pickle(origin)
        self._position += len(data)
        return load_state_pickle(data, origin=origin, limits=ScanLimits(max_bytes=self._max_pickle_bytes))

    def _next_pickle(self, origin: str) -> bytes:
        """Its bytes: nothing says how many they are, so larger and larger windows are looked through for its end."""
        most = min(self._length - self._position, self._max_pickle_bytes)
        window = min(_FIRST_WINDOW, most)
        while True:
            data = self._bytes(self._position, window)
            try:
                end = prescan(data, origin=origin, limits=ScanLimits(), allow_trailing=True).end
                return data[:end]
            except ExportError:
                if window >= most:
                    raise
            window = min(16 * window, most)

    def storages(self, keys: list[str], refs: dict[str, StorageRef]) -> dict[str, ZipEntry]:
        """Where each storage lies, by key. They must fill the rest of the file."""
        found: dict[str, ZipEntry] = {}
        for key in keys:
            ref = refs.get(key)
            if ref is None or key in found:
                raise ExportError(f"{self._origin}: storage {key!r} is listed twice, or no tensor has it")
            itemsize = 1 if ref.dtype is None else dtype_by_name(ref.dtype, where=f"{self._origin}: {key}").itemsize
            (count,) = _COUNT.unpack(self._bytes(self._position, _COUNT.size))
            start, size = self._position + _COUNT.size, count * itemsize
            if count != ref.num_elements:
                raise ExportError(
                    f"{self._origin}: storage {key} at byte {start} has {count} elements, "
                    f"{ref.num_elements} are declared; the file is damaged, copy it again"
                )
            if start + size > self._length:
                raise self._cut(start + size)
            found[key] = ZipEntry(start, size, 0)
            self._position = start + size
        if self._position != self._length:
            raise ExportError(f"{self._origin}: {self._length - self._position} bytes follow the last storage")
        return found

    def _bytes(self, position: int, size: int) -> bytes:
        if position + size > self._length:
            raise self._cut(position + size)
        try:
            data = self._read_at(position, size)
        except OSError as error:
            raise ExportError(f"{self._origin}: cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise self._cut(position + size)
        return data

    def _cut(self, needed: int) -> ExportError:
        return ExportError(f"{self._origin}: has {self._length} bytes, needs {needed}; the file is cut, copy it again")
