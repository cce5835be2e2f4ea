"""Small states that were serialised inside of a checkpoint, tensors included: ``torch.save`` zips and plain pickles.

A layer's ``_extra_state`` is bytes in a tensor, in an ``io.BytesIO`` or in a record, and those bytes may hold such
bytes again. All of it is parsed by the restricted reader (`pickles`), with bounds that let this process do it: a pickle
of ``MOST_OPCODES`` opcodes costs at most a hundred megabytes whatever is in it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dist_export.checkpoint.pickles import Record, ScanLimits, StorageRef, TensorRef, load_state_pickle, prescan
from dist_export.checkpoint.stand_ins import NESTED_STORAGES, Callback, rebuild_tensor_v2
from dist_export.checkpoint.torch_save import SavedState, read_entries, read_state
from dist_export.checkpoint.torch_save_unzipped import MAGIC, read_unzipped_state
from dist_export.errors import ExportError

MOST_BYTES = 1 << 26
"""Of one state. The amax history of 256 experts in one layer is 3 MiB."""
MOST_OPCODES = 400_000
_LIMITS = ScanLimits(max_bytes=MOST_BYTES, max_opcodes=MOST_OPCODES, max_depth=64, max_globals=256)
_NESTED_PICKLE = 1 << 12  # bytes; a bare storage takes about 100
_ZIP = b"PK\x03\x04"
_DTYPES = {"float32": "<f4", "float64": "<f8", "float16": "<f2", "uint8": "|u1", "int64": "<i8", "int32": "<i4"}
_REBUILT = "torch._utils._rebuild_tensor_v2"
_REBUILT_TYPE = "torch._tensor._rebuild_from_type_v2"

AnyArray = npt.NDArray[Any]


class StoredArray(Struct, frozen=True, eq=False):
    """A strided tensor and all of the storage that it is a view of."""

    values: AnyArray
    storage: AnyArray
    """[number of elements]"""
    offset: int
    """Of the first element, in elements."""
    strides: tuple[int, ...]


class SavedBytes(Struct, frozen=True, eq=False):
    """An object out of serialised bytes, of plain values and stand-ins."""

    value: Any
    origin: str
    _data: bytes
    _state: SavedState | None

    def array(self, tensor: object, *, name: str) -> StoredArray | None:
        """The elements of a tensor in `value`; None when it is no tensor.

        Raises `ExportError` when the elements are not there or of a type that no scale and no state has.
        """
        where = f"{self.origin}: {name}"
        if isinstance(tensor, Record) and tensor.kind == _REBUILT_TYPE:
            tensor = _plain_tensor(tensor)
        if isinstance(tensor, TensorRef):
            return self._located(tensor, where)
        if isinstance(tensor, Record) and tensor.kind == _REBUILT:
            return _nested(tensor, where)
        return None

    def content(self, value: object, *, name: str) -> bytes | None:
        """The bytes in a uint8 tensor, an ``io.BytesIO`` or bytes; None for anything else."""
        if isinstance(value, bytes):
            return value
        if isinstance(value, Record) and value.kind in ("_io.BytesIO", "io.BytesIO"):
            parts = (*(value.state if isinstance(value.state, tuple) else ()), *value.args)
            return next((part for part in parts if isinstance(part, bytes)), b"")
        found = self.array(value, name=name)
        if found is None or found.values.dtype != np.uint8 or found.values.ndim != 1:
            return None
        return found.values.tobytes()

    def _located(self, ref: TensorRef, where: str) -> StoredArray:
        if self._state is None:
            raise ExportError(f"{where}: a tensor in a pickle without storages")
        record = self._state.tensor(ref)
        entry = record.storage
        storage = self._data[entry.offset : entry.offset + entry.size]
        return _view(storage, ref.dtype, ref.storage_offset, ref.shape, ref.strides, where)


def read_bytes(data: bytes, *, origin: str) -> SavedBytes:
    """The object that ``torch.save`` or pickle wrote to `data`, told apart by the first bytes; `origin` names it.

    Raises `ExportError` for bytes of neither, for cut and damaged ones, and for all that `load_state_pickle` refuses.
    """
    if len(data) > MOST_BYTES:
        raise ExportError(f"{origin}: has {len(data)} bytes, at most {MOST_BYTES} are accepted for a layer's state")
    if data.startswith(_ZIP):
        return _read_zip(data, origin)
    if data.startswith(MAGIC):
        state = read_unzipped_state(_reader(data), len(data), origin=origin, max_pickle_bytes=1 << 20)
        return SavedBytes(state.value, origin, data, state)
    if data.startswith(b"\x80"):
        return SavedBytes(load_state_pickle(data, origin=origin, persistent=False, limits=_LIMITS), origin, data, None)
    raise ExportError(f"{origin}: begins with {data[:4]!r}, neither a pickle nor a torch.save file; it may be damaged")


def _read_zip(data: bytes, origin: str) -> SavedBytes:
    entry = read_entries(_reader(data), 0, len(data), origin=origin).get("data.pkl")
    if entry is not None:
        prescan(data[entry.offset : entry.offset + entry.size], origin=f"{origin}: data.pkl", limits=_LIMITS)
    state = read_state(_reader(data), 0, len(data), origin=origin, max_pickle_bytes=MOST_BYTES)
    return SavedBytes(state.value, origin, data, state)


def _reader(data: bytes) -> Any:
    return lambda offset, size: data[offset : offset + size]


def _plain_tensor(record: Record) -> object:
    """The tensor in ``_rebuild_from_type_v2(rebuild, type, arguments, state)``: one with attributes of its own."""
    rebuild, _, arguments, _ = record.args if len(record.args) == 4 else (None,) * 4
    if isinstance(rebuild, Callback) and rebuild.function is rebuild_tensor_v2 and isinstance(arguments, tuple):
        try:
            return rebuild_tensor_v2(*arguments)
        except (TypeError, ValueError):
            return None
    return None


def _nested(tensor: Record, where: str) -> StoredArray:
    """A tensor of plain pickle: its storage is a ``torch.save`` file of its own, always an unzipped one."""
    storage, offset, shape, strides, *_ = tensor.args
    payload = storage.args[0] if isinstance(storage, Record) and len(storage.args) == 1 else None
    if not isinstance(storage, Record) or storage.kind not in NESTED_STORAGES or not isinstance(payload, bytes):
        raise ExportError(f"{where}: a tensor whose elements are not in the file")
    if not payload.startswith(MAGIC):
        raise ExportError(f"{where}: a storage that is no torch.save file")
    saved = read_unzipped_state(_reader(payload), len(payload), origin=where, max_pickle_bytes=_NESTED_PICKLE)
    ref = saved.value
    if not isinstance(ref, StorageRef) or ref.dtype is None or not all(map(_are_counts, ((offset,), shape, strides))):
        raise ExportError(f"{where}: not a tensor over one typed storage")
    entry = saved.storages[ref.key]
    return _view(payload[entry.offset : entry.offset + entry.size], ref.dtype, offset, shape, strides, where)


def _are_counts(values: object) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 1 << 40 for value in values)


def _view(
    storage: bytes, dtype: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], where: str
) -> StoredArray:
    if dtype not in _DTYPES:
        raise ExportError(f"{where}: is of {dtype}, expected one of {', '.join(_DTYPES)}")
    flat = np.frombuffer(storage, _DTYPES[dtype])
    if len(shape) != len(strides):
        raise ExportError(f"{where}: has {len(shape)} sizes and {len(strides)} strides")
    count = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if count and last >= len(flat):
        raise ExportError(f"{where}: shape {list(shape)} does not fit into its storage of {len(flat)} elements")
    if count > len(flat):  # strides of 0 would make memory out of nothing
        raise ExportError(f"{where}: shape {list(shape)} repeats elements of a storage of {len(flat)}")
    if not count:
        return StoredArray(np.zeros(shape, flat.dtype), flat, offset, strides)
    steps = tuple(step * flat.itemsize for step in strides)
    values = np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False))
    return StoredArray(values.reshape(shape), flat, offset, strides)
