"""Where a checkpoint keeps the ``_extra_state`` of its layers, and reading them: one list for every format.

``torch_dist`` and zarr have a sharded object per layer, ``KEY._extra_state/shard_OFFSET_SHAPE``, whose offset is the
layer where the key has no layer number (and the expert, or both); legacy files have the state of every tp rank, under
``KEY._extra_state/mp_rank_…`` in a table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain

from msgspec import Struct

from dist_export.checkpoint.extra_state import ExtraState, decode_extra_state
from dist_export.checkpoint.index import CheckpointIndex, ObjectRecord
from dist_export.checkpoint.quantizer_names import ModuleName, module_name
from dist_export.checkpoint.rank_extra_states import states_in_ranks
from dist_export.checkpoint.saved_bytes import MOST_BYTES
from dist_export.errors import ExportError, Faults

_NAME = re.compile(r"^(?P<module>.+?)\._extra_state(?P<number>\d*)(?:/(?P<label>[^/]+))?$")
_SHARD = re.compile(r"^shard_(?P<offset>\d+(?:\.\d+)*)_(?P<shape>\d+(?:\.\d+)*)$")
_MOST_DIGITS = 12


class StateRecord(Struct, frozen=True):
    """A layer's state as it lies in the checkpoint."""

    module: ModuleName
    record: ObjectRecord | None
    """None: inside of a rank's pickle."""
    name: str
    """In `CheckpointIndex.objects`: for errors."""
    rank: str = ""
    """Folder of the training rank that it is of, in legacy checkpoints."""


def state_records(index: CheckpointIndex) -> list[StateRecord]:
    """Every layer state of a checkpoint, in order of layers and experts. Reads nothing.

    Raises `ExportError` naming those whose position in the model cannot be told.
    """
    faults = Faults(f"{index.folder}: states of layers cannot be placed in the model")
    found = []
    for name, record in index.objects.items():
        match = _NAME.match(name)
        if match is None:
            continue
        try:
            found.append(_placed(name, match, record))
        except ExportError as error:
            faults.add(str(error))
    faults.raise_if_any()
    return sorted(found, key=lambda each: (each.module.pattern, each.module.layer, each.module.expert, each.rank))


def read_states(index: CheckpointIndex) -> Iterator[tuple[StateRecord, ExtraState]]:
    """Every layer state, decoded one after the other. Raises `ExportError` naming all that cannot be read."""
    faults = Faults(f"{index.folder}: states of layers (_extra_state) cannot be read")
    for each, data in chain(_from_table(index, faults), _from_ranks(index)):
        try:
            state = decode_extra_state(data, origin=each.name)
        except ExportError as error:
            faults.add(str(error))
            continue
        yield each, state
    faults.raise_if_any()


def _from_table(index: CheckpointIndex, faults: Faults) -> Iterator[tuple[StateRecord, bytes]]:
    for each in state_records(index):
        try:
            data = _read(index, each)
        except ExportError as error:
            faults.add(str(error))
            continue
        yield each, data


def _from_ranks(index: CheckpointIndex) -> Iterator[tuple[StateRecord, bytes]]:
    for module, rank, data in states_in_ranks(index):
        name = f"{module}._extra_state/{rank}"
        yield StateRecord(module_name(module), None, name, rank), data


def _read(index: CheckpointIndex, each: StateRecord) -> bytes:
    record = each.record
    assert record is not None
    path = index.path(record.file)
    if record.length > MOST_BYTES:
        raise ExportError(f"{each.name}: has {record.length} bytes, at most {MOST_BYTES} are accepted")
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), record.length, record.offset)
    except OSError as error:
        raise ExportError(f"{each.name}: {path}: {error.strerror or error}") from error
    if len(data) != record.length:
        raise ExportError(f"{each.name}: {path} is cut: {record.length} bytes wanted at {record.offset}")
    return data


def _placed(name: str, match: re.Match[str], record: ObjectRecord) -> StateRecord:
    module = module_name(match["module"] or "")
    label, number = match["label"] or "", match["number"]
    shard = _SHARD.match(label)
    if shard is None:
        return StateRecord(module, record, name, rank=label)
    offset = _numbers(shard["offset"])
    shape = _numbers(shard["shape"])
    holes = [hole for hole in ("layer", "expert") if f"{{{hole}}}" in module.pattern and getattr(module, hole) < 0]
    if not holes and (offset, shape) == ((0,), (1,)):
        return StateRecord(module, record, name)
    if number or len(holes) != len(offset) or len(shape) != len(offset) or not _inside(offset, shape):
        raise ExportError(f"{name}: its place {label} does not fit {' and '.join(holes) or 'a module of its own'}")
    at = dict(zip(holes, offset, strict=True))
    placed = ModuleName(module.pattern, at.get("layer", module.layer), at.get("expert", module.expert))
    return StateRecord(placed, record, name)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part[:_MOST_DIGITS]) for part in text.split("."))


def _inside(offset: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(0 <= place < size for place, size in zip(offset, shape, strict=True))
