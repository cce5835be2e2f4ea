"""What the process that parses pickles hands to the one that asked: the stand-ins of a state, and nothing else.

They travel as a pickle, since that keeps shared and cyclic values as they are; it is read with the handful of names
below, so that not even a parsing process that a file had taken over could have code run.
"""

from __future__ import annotations

import io
import pickle
from functools import lru_cache
from typing import Any

from dist_export.checkpoint.stand_ins import Callback, OrderedItems, Record, StorageClass, StorageRef, TensorRef
from dist_export.checkpoint.stand_ins import record_class as fresh_record_class
from dist_export.errors import ExportError

_PROTOCOL = 5


def pack(value: Any, *, origin: str) -> bytes:
    """`value` (of plain values and stand-ins) as bytes. `ExportError` naming `origin` when it is nested too deeply."""
    buffer = io.BytesIO()
    try:
        _Packer(buffer, _PROTOCOL).dump(value)
    except RecursionError:
        raise ExportError(f"{origin}: its values are nested too deeply for a checkpoint") from None
    return buffer.getvalue()


def unpack(data: bytes | memoryview, *, origin: str) -> Any:
    """What `pack` was given. `ExportError` naming `origin` for anything that `pack` does not make."""
    try:
        return _Unpacker(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise ExportError(f"{origin}: the process that parses it left something unreadable: {error}") from None


class _Packer(pickle.Pickler):
    """Names every stand-in by what makes it again; a class made for a pickle is not to be found by its name."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Record):
            return new_record, (value.kind,), (value.args, value.kwargs, value.state, value.items), None, None, fill
        if isinstance(value, type) and issubclass(value, Record):
            return record_class, (value.kind,)
        if isinstance(value, Callback):  # a function as a value, not called: a class nobody knows will do
            return record_class, ("function",)
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is no stand-in")
        return found


@lru_cache(maxsize=4096)
def record_class(kind: str) -> type[Record]:
    """The subclass of `Record` for the class called `kind`."""
    return fresh_record_class(kind)


def new_record(kind: str) -> Record:
    """A record without its content, which may refer to it."""
    return record_class(kind)()


def fill(record: Record, content: tuple[Any, ...]) -> None:
    """Give a record its content."""
    record.args, record.kwargs, record.state, record.items = content


_NAMES = {
    (known.__module__, known.__qualname__): known
    for known in (new_record, fill, record_class, OrderedItems, StorageClass, StorageRef, TensorRef)
}
