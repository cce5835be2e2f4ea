"""What a rank holds, as Megatron's ``sharded_state_dict()`` says it: any training layout, every kind of layer.

Recognised by their attributes, so that nothing of Megatron is imported: ``ShardedTensor``, ``ShardedTensorFactory`` and
``ShardedObject`` (megatron/core/dist_checkpointing/mapping.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dist_export.errors import ExportError, Faults
from dist_export.live.memory import RankMemory, check_tensor, dtype_name, object_entries
from dist_export.live.table import Holdings, ObjectEntry, ShardEntry


def collect(state: Any) -> tuple[RankMemory, Holdings]:
    """This rank's memory and what `make_table` must know of it.

    `state` is what ``model.sharded_state_dict()`` returned, or a list of such (one per virtual pipeline stage). Every
    rank calls it for its own. Some factories copy (a grouped MLP's transposed experts): those copies are kept.
    Raises `ExportError` naming whatever is neither a tensor nor an object.
    """
    memory = RankMemory()
    entries: list[ShardEntry] = []
    objects: list[ObjectEntry] = []
    faults = Faults("state of a live model")
    for value in _values(state):
        key = getattr(value, "key", None)
        if not isinstance(key, str):
            faults.add(f"holds a {type(value).__name__}; give what model.sharded_state_dict() returns")
        elif hasattr(value, "global_offset") and hasattr(value, "prepend_axis_num"):
            try:
                entries.append(_entry(key, value, memory))
            except ExportError as error:
                faults.add(str(error))
        else:
            objects += object_entries(str(getattr(value, "unique_key", key)), getattr(value, "data", None), memory)
    faults.raise_if_any()
    return memory, Holdings(tuple(entries), tuple(objects))


def _entry(key: str, shard: Any, memory: RankMemory) -> ShardEntry:
    tensor = check_tensor(key, shard.data)
    if getattr(shard, "flattened_range", None) is not None:
        raise ExportError(f"{key}: a flattened piece of an optimizer, not a weight")
    size = (1,) * int(shard.prepend_axis_num) + tuple(tensor.shape)
    address = memory.add(tensor)
    num_bytes = tensor.numel() * tensor.element_size()
    shape, start = tuple(map(int, shard.global_shape)), tuple(map(int, shard.global_offset))
    return ShardEntry(key, shape, dtype_name(tensor), start, size, address, num_bytes)


def _values(state: Any) -> Iterator[Any]:
    """All leaves of nested dictionaries and lists, with factories' parts in place of factories."""
    if isinstance(state, Mapping):
        for value in state.values():
            yield from _values(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _values(value)
    elif hasattr(state, "build_fn") and hasattr(state, "merge_fn"):
        yield from _values(state.build())
    elif state is not None:
        yield state
