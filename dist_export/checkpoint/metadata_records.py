"""Light stand-ins for the classes of torch.distributed.checkpoint that ``.metadata`` is made of.

Source: torch/distributed/checkpoint/metadata.py, filesystem.py, planner.py of torch 2.1 to 2.13. A state may carry
fields of newer releases only where they are None.
"""

from __future__ import annotations

from typing import Any

from dist_export.checkpoint.stand_ins import Callback, dtype_name, flat_size, refuse_state

_METADATA = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # TensorProperties of torch 2.1 and 2.2
_PLANNER = "torch.distributed.checkpoint.planner"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"


class Metadata:
    """The whole: what tensors there are and where their chunks lie."""

    __slots__ = ("mcore_data", "others", "planner_data", "state_dict_metadata", "storage_data", "storage_meta")
    state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    storage_data: dict[MetadataIndex, StorageInfo]
    planner_data: Any
    """None for torch_dist; flat key -> path for torch_dcp and fsdp_dtensor."""
    storage_meta: Any
    mcore_data: Any
    """Megatron-Core 0.8 to 0.15: key -> {} or the shape a flattened optimizer tensor had."""
    others: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state_dict_metadata = state.pop("state_dict_metadata")
        self.storage_data = state.pop("storage_data")
        self.planner_data = state.pop("planner_data", None)
        self.storage_meta = state.pop("storage_meta", None)
        self.mcore_data = state.pop("mcore_data", None)
        state.pop("all_local_plans", None)
        self.others = dict(state)


# The states below are emptied once taken over: the unpickler's memo keeps every dict alive until the end.


class TensorStorageMetadata:
    """One tensor: global `size`, element type, chunks in no particular order."""

    __slots__ = ("chunks", "properties", "size")
    properties: TensorProperties
    size: tuple[int, ...]
    chunks: list[ChunkStorageMetadata]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.properties = state.pop("properties")
        self.size = state.pop("size")
        self.chunks = state.pop("chunks")
        _finish(self, state)


class BytesStorageMetadata:
    """One pickled object; it says nothing about it."""

    __slots__ = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        _finish(self, state)


class ChunkStorageMetadata:
    """A box of a tensor."""

    __slots__ = ("offsets", "sizes")
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.offsets = state.pop("offsets")
        self.sizes = state.pop("sizes")
        if state:
            _finish(self, state)
        state.clear()  # gives the emptied table back


class MetadataIndex:
    """Names a chunk by key and offset (None for a pickled object); `index` is a hint and left out.

    Compared and hashed by identity: look chunks up by (fqn, offset).
    """

    __slots__ = ("fqn", "offset")
    fqn: str
    offset: tuple[int, ...] | None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fqn = state.pop("fqn")
        self.offset = state.pop("offset", None)  # torch leaves both out when they are None
        state.pop("index", None)
        if state:
            _finish(self, state)
        state.clear()  # gives the emptied table back


class StorageInfo:
    """Where a record lies: bytes [offset, offset + length) of a file. `transform_descriptors` since torch 2.7."""

    __slots__ = ("length", "offset", "relative_path", "transform_descriptors")
    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.relative_path = state.pop("relative_path")
        self.offset = state.pop("offset")
        self.length = state.pop("length")
        self.transform_descriptors = state.pop("transform_descriptors", None)
        if state:
            _finish(self, state)
        state.clear()


class TensorProperties:
    """The element type; layout, gradient flag and memory format do not concern a reader of chunks."""

    __slots__ = ("dtype",)
    dtype: str

    def __setstate__(self, state: Any) -> None:
        self.dtype = state["dtype"] if type(state) is dict else state[0]


class Unused:
    """Anything a reader has no use for (save plans, enums, paths): nothing is kept but constructor arguments."""

    __slots__ = ("args",)
    args: tuple[Any, ...]

    def __new__(cls, *args: Any) -> Unused:
        self = object.__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state: Any) -> None:
        if type(state) is dict:
            state.clear()


class PlannerDict(dict[Any, Any]):
    """Stands for ``collections.OrderedDict`` in planner data."""

    __slots__ = ()
    __setstate__ = refuse_state

    def __init__(self) -> None:
        super().__init__()


def _finish(self: object, state: dict[str, Any]) -> None:
    """Nothing but None may be left of a state; empty it."""
    unknown = [str(name) for name, value in state.items() if value is not None]
    if unknown:
        raise ValueError(f"{type(self).__name__} with unknown fields {', '.join(unknown[:5])}")
    state.clear()


def _enum_member(*args: object) -> Unused:
    """``getattr(cls, name)`` of an enum that does not matter; see `stand_ins.enum_member`."""
    cls, name = args if len(args) == 2 else (None, None)
    if cls is not Unused or type(name) is not str:
        raise TypeError("refused: it names builtins.getattr, and not for a member of an enum")
    return Unused(name)


def _layout(name: object = "") -> str:
    return str(name) if type(name) is str else ""


_CLASSES: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): Metadata,
    (_MCORE, "MCoreMetadata"): Metadata,
    (_METADATA, "TensorStorageMetadata"): TensorStorageMetadata,
    (_METADATA, "BytesStorageMetadata"): BytesStorageMetadata,
    (_METADATA, "ChunkStorageMetadata"): ChunkStorageMetadata,
    (_METADATA, "MetadataIndex"): MetadataIndex,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    (_METADATA, "TensorProperties"): TensorProperties,
    (_SHARDED, "TensorProperties"): TensorProperties,
    ("torch", "Size"): Callback(flat_size),
    ("torch.serialization", "_get_layout"): Callback(_layout),
    ("builtins", "getattr"): Callback(_enum_member),
    ("collections", "OrderedDict"): PlannerDict,
    (_METADATA, "StorageMeta"): Unused,
    (_METADATA, "_MEM_FORMAT_ENCODING"): Unused,
    (_SHARDED, "MEM_FORMAT_ENCODING"): Unused,
    (_MCORE, "MCoreSavePlan"): Unused,
    **{(_PLANNER, name): Unused for name in ("SavePlan", "WriteItem", "WriteItemType")},
    **{(_PLANNER, name): Unused for name in ("TensorWriteData", "BytesIOWriteData")},
    **{(module, name): Unused for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}


def resolve_metadata_name(module: str, name: str) -> Any:
    """The stand-in for a name in ``.metadata``, or None when it has no place there."""
    return _CLASSES.get((module, name)) or dtype_name(module, name)


def check_metadata(value: object) -> Metadata:
    """`value` as the metadata of a checkpoint, every field of every entry of the right type.

    Raises ValueError, TypeError or AttributeError (a field never set) when it is anything else.
    """
    if type(value) is not Metadata:
        raise ValueError(f"it holds a {type(value).__name__}, not the metadata of a checkpoint")
    if type(value.state_dict_metadata) is not dict or type(value.storage_data) is not dict:
        raise ValueError("its tensors or records are not dictionaries")
    for key, entry in value.state_dict_metadata.items():
        if type(key) is not str or type(entry) not in (TensorStorageMetadata, BytesStorageMetadata):
            raise ValueError(f"an entry {str(key)[:200]!r} that is neither a tensor nor an object")
        if type(entry) is TensorStorageMetadata:
            _check_tensor(key, entry)
    for index, info in value.storage_data.items():
        if type(index) is not MetadataIndex or type(info) is not StorageInfo:
            raise ValueError("a record of an unknown kind")
        _check_record(index, info)
    return value


def _check_tensor(key: str, entry: TensorStorageMetadata) -> None:
    if type(entry.properties) is not TensorProperties or type(entry.properties.dtype) is not str:
        raise ValueError(f"{key} has no element type")
    if type(entry.chunks) is not list or not _is_extent(entry.size):
        raise ValueError(f"{key} has no shape or no list of chunks")
    for chunk in entry.chunks:
        if type(chunk) is not ChunkStorageMetadata or not _is_extent(chunk.offsets) or not _is_extent(chunk.sizes):
            raise ValueError(f"{key} has a chunk without offsets and sizes")


def _check_record(index: MetadataIndex, info: StorageInfo) -> None:
    if type(index.fqn) is not str or not (index.offset is None or _is_extent(index.offset)):
        raise ValueError("a record without a key and an offset")
    if type(info.relative_path) is not str or type(info.offset) is not int or type(info.length) is not int:
        raise ValueError(f"the record of {index.fqn} has no file, offset and length")


def _is_extent(value: object) -> bool:
    """Whether `value` is a tuple of natural numbers."""
    return type(value) is tuple and all(type(size) is int and size >= 0 for size in value)
