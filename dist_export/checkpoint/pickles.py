"""Pickles of a checkpoint, read without trusting them.

Every pickle is looked over first (`prescan`), then parsed by the C unpickler with all names resolved to the inert
stand-ins of `stand_ins` and `metadata_records`: nothing is imported, and nothing that a pickle names is called.
What remains is memory in proportion to the number of opcodes, and time: parse files of unknown origin in a process
with limits on both.
"""

from __future__ import annotations

import gc
import io
import pickle
import signal
import struct
import sys
from _compat_pickle import IMPORT_MAPPING  # type: ignore[import-not-found, unused-ignore]  # private to the library
from collections.abc import Callable
from typing import Any

from dist_export.checkpoint.metadata_records import Metadata, check_metadata, resolve_metadata_name
from dist_export.checkpoint.pickle_bounds import METADATA_LIMITS, PickleSummary, ScanLimits
from dist_export.checkpoint.pickle_scan import prescan
from dist_export.checkpoint.stand_ins import (
    Callback,
    OrderedItems,
    Record,
    StorageRef,
    TensorRef,
    dtype_name,
    enum_member,
    flat_size,
    rebuild_parameter,
    rebuild_tensor,
    rebuild_tensor_v2,
    rebuild_tensor_v3,
    record_class,
    storage_class,
    storage_from_persistent_id,
)
from dist_export.errors import ExportError

__all__ = [
    "Metadata",
    "PickleSummary",
    "Record",
    "ScanLimits",
    "StorageRef",
    "TensorRef",
    "cut_local_plans",
    "load_metadata_pickle",
    "load_state_pickle",
    "prescan",
]

_MALFORMED = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    SystemError,
    OSError,
)
"""What the unpickler and the stand-ins raise for pickles that no checkpoint has."""

_Resolve = Callable[[str, str], Any]


def load_metadata_pickle(data: bytes, *, origin: str) -> Metadata:
    """The content of a ``.metadata`` file, every field of the right type. `origin` names the file in errors.

    Save plans (see `cut_local_plans`) are cut off first where that is possible, and ignored otherwise. Raises
    `ExportError` for anything but the classes of torch.distributed.checkpoint (and Megatron-Core 0.8 to 0.15)
    that such a file is made of, naming the class, and for cut or malformed pickles.
    """
    shorter = _without_local_plans(data)
    if shorter is not None:
        try:
            return _load_metadata(shorter, origin)
        except ExportError:
            pass  # the cut was wrong, or the file is: the whole of it tells
    return _load_metadata(data, origin)


def _load_metadata(data: bytes, origin: str) -> Metadata:
    prescan(data, origin=origin, limits=METADATA_LIMITS)

    def resolve(module: str, name: str) -> Any:
        known = resolve_metadata_name(module, name)
        if known is None:
            raise ExportError(f"{origin}: refused: it names {module}.{name}, which has no place in checkpoint metadata")
        return known

    value = _parse(data, origin, resolve, persistent=False)
    try:
        return check_metadata(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ExportError(f"{origin}: not checkpoint metadata: {error}") from None


def load_state_pickle(
    data: bytes,
    *,
    origin: str,
    persistent: bool = True,
    limits: ScanLimits | None = None,
    allow_trailing: bool = False,
) -> Any:
    """The object in a pickled state (saved arguments, a state dict): plain values, `TensorRef` and `Record`.

    Args:
        origin: Names the file in errors.
        persistent: Whether storages may lie outside the pickle, as in a ``torch.save`` file.
        limits: What the pickle may cost.
        allow_trailing: Whether bytes may follow the pickle.

    Dtypes become their names, ``OrderedDict`` a dict, instances of every other class a `Record`. Raises
    `ExportError` for malformed pickles and for names of the standard library that no checkpoint needs.
    """
    prescan(data, origin=origin, limits=limits, allow_trailing=allow_trailing)
    return _parse(data, origin, _StateNames(origin, len(data)).resolve, persistent=persistent)


class _Unpickler(pickle.Unpickler):
    """The C unpickler with both of its ways out replaced."""

    def __init__(self, data: bytes, resolve: _Resolve, persistent: bool) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._resolve = resolve
        self._persistent = persistent
        self._found: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = self._found.get((module, name))
        if found is None:
            found = self._found[module, name] = self._resolve(module, name)
        return found

    def persistent_load(self, pid: object) -> StorageRef:
        if not self._persistent:
            raise ValueError("it refers to storages outside of it")
        return storage_from_persistent_id(pid)


def _parse(data: bytes, origin: str, resolve: _Resolve, *, persistent: bool) -> Any:
    collecting = gc.isenabled()
    gc.disable()  # a million new objects and no garbage: collecting would take half of the time
    try:
        return _Unpickler(data, resolve, persistent).load()
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        raise ExportError(f"{origin}: not a pickle of a checkpoint: {reason}") from None
    finally:
        if collecting:
            gc.enable()


_LIBRARY = frozenset(sys.stdlib_module_names) | {name.partition(".")[0] for name in IMPORT_MAPPING}
"""Top modules of the standard library, with the names that some of them had in Python 2."""
_BUILTINS = {
    *("set", "frozenset", "bytearray", "bytes", "complex", "range", "slice", "list", "tuple", "dict"),
    *("int", "float", "str", "bool", "object", "type", "Ellipsis", "NotImplemented", "NoneType"),
}
_LIBRARY_NAMES = {
    "argparse": {"Namespace"},
    "builtins": _BUILTINS,
    "__builtin__": {*_BUILTINS, "long", "unicode", "xrange"},
    "signal": {"Signals", "Handlers"},
    "types": {"SimpleNamespace"},
    "functools": {"partial"},
    "pathlib": {f"{prefix}Path" for prefix in ("", "Pure", "Posix", "Windows", "PurePosix", "PureWindows")},
    "collections": {"OrderedDict", "defaultdict", "deque", "Counter"},
    "enum": {"Enum", "IntEnum", "Flag", "IntFlag", "StrEnum"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "uuid": {"UUID", "SafeUUID"},
    "io": {"BytesIO", "StringIO"},
    "dataclasses": {"_MISSING_TYPE"},
}
"""The only names of the standard library that become inert records; every other one is refused."""
_LIBRARY_NAMES["_io"] = _LIBRARY_NAMES["io"]
_LIBRARY_NAMES["pathlib._local"] = _LIBRARY_NAMES["pathlib"]


_KNOWN_NAMES: dict[tuple[str, str], Any] = {
    ("builtins", "getattr"): Callback(enum_member),
    ("__builtin__", "getattr"): Callback(enum_member),
    ("collections", "OrderedDict"): OrderedItems,
    ("torch", "Size"): Callback(flat_size),
    ("torch._utils", "_rebuild_tensor"): Callback(rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Callback(rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Callback(rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Callback(rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Callback(rebuild_parameter),
}


class _StateNames:
    """Resolves the names of one state pickle."""

    def __init__(self, origin: str, budget: int) -> None:
        self._origin = origin
        self._budget = budget
        self._encode_callback = Callback(self._encode)
        self._reconstruct_callback = Callback(self._reconstruct)

    def resolve(self, module: str, name: str) -> Any:
        """The stand-in for ``module.name``; `ExportError` when it is refused."""
        known = _KNOWN_NAMES.get((module, name)) or dtype_name(module, name) or storage_class(module, name)
        if known is not None:
            return known
        if (module, name) == ("_codecs", "encode"):
            return self._encode_callback
        if (module, name) in (("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor")):
            return self._reconstruct_callback
        if module == "signal" and name in signal.Signals.__members__:  # Python 3.11.2 names them so: exit_signal
            return record_class("signal.Signals")(signal.Signals[name].value)
        if module.partition(".")[0] in _LIBRARY and name not in _LIBRARY_NAMES.get(module, ()):
            raise ExportError(f"{self._origin}: refused: it names {module}.{name}, which no checkpoint needs")
        return record_class(f"{module}.{name}")

    def _encode(self, text: object, encoding: object = "latin1") -> bytes:
        """``_codecs.encode``: how protocol 2 writes bytes. One pickle gets no more of them than its own size."""
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise ValueError("bytes that are not encoded as latin1")
        self._budget -= len(text)
        if self._budget < 0:
            raise ValueError("it expands to more bytes than it has")
        return text.encode("latin1")

    @staticmethod
    def _reconstruct(cls: object, *_: object) -> Record:
        """``copyreg._reconstructor``: how protocols 0 and 1 make an instance."""
        if not isinstance(cls, type) or not issubclass(cls, Record):
            raise TypeError("an instance of something that is no class")
        return cls()


def cut_local_plans(data: bytes) -> bytes:
    """``.metadata`` without ``all_local_plans``, the save plans of all ranks, about 40 % of the file.

    Megatron-Core 0.11 on writes them as the last attribute of the metadata: the pickle is ended before them and
    the frame around the cut is shortened. Returned unchanged when there are none or when anything about the file
    is not as expected. `load_metadata_pickle` does this by itself.
    """
    shorter = _without_local_plans(data)
    if shorter is None:
        return data
    try:
        prescan(shorter, origin="", limits=METADATA_LIMITS)
    except ExportError:
        return data
    return shorter


def _without_local_plans(data: bytes) -> bytes | None:
    """`data` cut, not yet known to be a pickle; None when there is nothing to cut or no way to."""
    marker = data.rfind(b"\x8c\x0fall_local_plans\x94")
    if marker < 0 or not data.endswith(b"ub.") or data[:1] != b"\x80":
        return None
    frame = _frame_around(data, marker)
    if frame is None:
        return None
    ending = b"ub."  # SETITEMS, BUILD, STOP
    length = struct.pack("<Q", marker - frame - 9 + len(ending))
    return b"".join((data[:frame], b"\x95", length, data[frame + 9 : marker], ending))


def _frame_around(data: bytes, position: int) -> int | None:
    """Start of the frame that holds `position`, or None when frames do not follow each other up to it."""
    frame = 2
    while data[frame : frame + 1] == b"\x95" and frame + 9 <= position:
        (length,) = struct.unpack_from("<Q", data, frame + 1)
        if frame + 9 + length > position:
            return frame
        frame += 9 + length
    return None
