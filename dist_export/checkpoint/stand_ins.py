"""What a checkpoint's pickles are made of here: inert values of our own, never the classes they name.

A pickle can call what it names, set attributes on it (BUILD) and keep it. So every stand-in that a pickle can get
hold of is a plain string, or has a ``__setstate__`` of its own: BUILD prefers that to writing into the object, and
called on a class it fails for want of an argument. None of them does work that grows beyond the pickle's own size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from msgspec import Struct

_DTYPE = re.compile(r"(bfloat16|bool|(u?int|float|complex|bits|qu?int)\d\w*)")
_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "QUInt8Storage": "quint8",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": None,
}
"""torch/storage.py, _dtype_to_storage_type_map; an untyped storage counts bytes."""
_LARGEST = 1 << 62  # of a size, stride, offset or element count


def refuse_state(self: object, state: object) -> NoReturn:
    """The ``__setstate__`` of stand-ins without state."""
    raise TypeError(f"{type(self).__name__} takes no state")


class Record:
    """An inert stand-in for an instance of a class that is not ours; each class gets a subclass of its own.

    Whatever the pickle does to the instance is stored: constructor arguments in `args` and `kwargs`, its state in
    `state`, appended, added or set items in `items`. A class that is itself a value (a function or a type among
    saved arguments) is the bare subclass. Enum members are pickled as ``Class(value)``: `args` is ``(value,)``; or, by
    Python 3.11.2 for one, by name (see `enum_member`): `kwargs` is ``{"name": name}``. Compared and hashed by identity.
    """

    __slots__ = ("args", "items", "kwargs", "state")
    kind: str = ""
    """``module.QualName`` of the class it stands for."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        self = object.__new__(cls)
        self.args = args
        self.kwargs = kwargs
        self.state = None
        self.items = []
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, item: object) -> None:
        """Pickle opcode APPEND."""
        self.items.append(item)

    def extend(self, items: list[object]) -> None:
        """Pickle opcode APPENDS; only lists, of which each is made by the opcode itself."""
        self.items.extend(items)

    def add(self, item: object) -> None:
        """Pickle opcode ADDITEMS."""
        self.items.append(item)

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name` out of the state (a dict, or a pair of dicts for classes with slots)."""
        for part in self.state if isinstance(self.state, tuple) else (self.state,):
            if isinstance(part, Mapping) and name in part:
                return part[name]
        return default

    def __repr__(self) -> str:
        return f"<Record of {self.kind}>"


def record_class(kind: str) -> type[Record]:
    """A fresh subclass of `Record` that stands for the class called `kind`."""
    return type("Record", (Record,), {"__slots__": (), "kind": kind, "__module__": Record.__module__})


def enum_member(*args: object) -> Record:
    """``getattr(cls, name)``: how Python 3.11.2 (Debian 12's) pickles an enum member; enum.py, ``Enum.__reduce_ex__``.

    Nothing is looked up. Raises TypeError for anything but a bare `Record` class and a string.
    """
    cls, name = args if len(args) == 2 else (None, None)
    if not isinstance(cls, type) or not issubclass(cls, Record) or type(name) is not str:
        raise TypeError("refused: it names builtins.getattr, and not for a member of an enum")
    return cls(name=name)


class OrderedItems(dict[Any, Any]):
    """Stands for ``collections.OrderedDict``. Its attributes (a state dict's ``_metadata``) are dropped: they hold
    module versions, no tensors."""

    __slots__ = ()

    def __init__(self, *args: object) -> None:
        if args:  # only Python 2 pickled the items as an argument; copying them here would have no bound
            raise TypeError("OrderedDict with arguments")
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


class Callback:
    """A function of ours under a name that pickles call."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> object:
        return self.function(*args)

    __setstate__ = refuse_state


class StorageClass(Struct, frozen=True):
    """Stands for ``torch.XStorage``; `dtype` is None for UntypedStorage."""

    __setstate__ = refuse_state

    dtype: str | None


class StorageRef(Struct, frozen=True):
    """A storage that lies elsewhere in the same file."""

    __setstate__ = refuse_state

    key: str
    """Entry ``data/<key>`` of a ``torch.save`` zip."""
    dtype: str | None
    """Element type as torch prints it without ``torch.``; None for an untyped storage."""
    location: str
    num_elements: int
    """Bytes when `dtype` is None."""


class TensorRef(Struct, frozen=True):
    """A strided tensor over a storage. Offset and strides count elements of `dtype`."""

    __setstate__ = refuse_state

    dtype: str
    storage: StorageRef
    storage_offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def dtype_name(module: str, name: str) -> str | None:
    """The element type called ``torch.<name>``, or None when that is no dtype."""
    return name if module == "torch" and _DTYPE.fullmatch(name) else None


def storage_class(module: str, name: str) -> StorageClass | None:
    """The stand-in for a torch storage class, or None when the name is not one."""
    if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGE_DTYPES:
        return StorageClass(_STORAGE_DTYPES[name])
    return None


def storage_from_persistent_id(value: object) -> StorageRef:
    """The storage a persistent id names: ("storage", class, key, location, numel[, None]). Raises ValueError."""
    if type(value) is not tuple or len(value) not in (5, 6) or value[0] != "storage":
        raise ValueError("a persistent id that names no storage")
    _, kind, key, location, count, *view = value
    if type(kind) is not StorageClass or type(key) is not str or type(location) is not str:
        raise ValueError("a persistent id that names no storage")
    if view not in ([], [None]):
        raise ValueError(f"storage {key!r} is a view of another storage, as torch before 0.4 wrote it")
    return StorageRef(key, kind.dtype, location, _count(count))


def flat_size(values: object = ()) -> tuple[int, ...]:
    """``torch.Size``: a tuple of integers as it is. Anything else would let tuples nest without bound."""
    if type(values) is not tuple or not all(type(value) is int for value in values):
        raise TypeError("torch.Size of something other than integers")
    return values


def rebuild_tensor(storage: object, offset: object, size: object, strides: object) -> TensorRef:
    """``torch._utils._rebuild_tensor``."""
    if type(storage) is not StorageRef or storage.dtype is None:
        raise ValueError("a tensor without a typed storage")
    return _tensor(storage.dtype, storage, offset, size, strides)


NESTED_STORAGES = frozenset(("torch.storage._load_from_bytes", "megatron.core.safe_globals.safe_load_from_bytes"))
"""What plain pickle calls to make a storage, with a ``torch.save`` file of its own as bytes. Nothing here opens those:
the storage is a `Record` of that name, and so is a tensor over it (``torch._utils._rebuild_tensor_v2``)."""
_REBUILT_V2 = record_class("torch._utils._rebuild_tensor_v2")
_REBUILT_V3 = record_class("torch._utils._rebuild_tensor_v3")
_REBUILT_PARAMETER = record_class("torch._utils._rebuild_parameter")


def rebuild_tensor_v2(*args: Any) -> object:
    """``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)``."""
    storage, offset, size, strides, _, _, *metadata = args
    if any(metadata):  # conjugate or negative bit set: the stored bytes are not the values
        return _REBUILT_V2(*args)
    if isinstance(storage, Record) and storage.kind in NESTED_STORAGES:
        return _REBUILT_V2(*args)
    return rebuild_tensor(storage, offset, size, strides)


def rebuild_tensor_v3(*args: Any) -> object:
    """``_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None)``."""
    storage, offset, size, strides, _, _, dtype, *metadata = args
    if any(metadata):
        return _REBUILT_V3(*args)
    if type(storage) is not StorageRef or storage.dtype is not None or type(dtype) is not str:
        raise ValueError("_rebuild_tensor_v3 without an untyped storage and a dtype")
    return _tensor(dtype, storage, offset, size, strides)


def rebuild_parameter(*args: Any) -> object:
    """``_rebuild_parameter(data, requires_grad, hooks[, state])``: the tensor itself."""
    data, *_ = args
    return data if type(data) is TensorRef else _REBUILT_PARAMETER(*args)


def _tensor(dtype: str, storage: StorageRef, offset: object, size: object, strides: object) -> TensorRef:
    shape, steps = flat_size(size), flat_size(strides)
    if len(shape) != len(steps):
        raise ValueError(f"a tensor with {len(shape)} sizes and {len(steps)} strides")
    return TensorRef(dtype, storage, _count(offset), tuple(map(_count, shape)), tuple(map(_count, steps)))


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError("a size, stride, offset or count that is no natural number")
    return value
