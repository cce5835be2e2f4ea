"""The files of a legacy checkpoint: one ``torch.save`` file per training rank, of which only the pickle is read.

Source of the layout: Megatron-LM, megatron/training/checkpointing.py, ``get_checkpoint_name`` and
``generate_state_dict``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from dist_export.checkpoint.legacy_shards import Shard
from dist_export.checkpoint.pickles import Record, TensorRef
from dist_export.checkpoint.torch_save import SavedState, read_state
from dist_export.checkpoint.torch_save_unzipped import MAGIC, read_unzipped_state, tensors_in
from dist_export.errors import ExportError, Faults
from dist_export.tensors.dtypes import dtype_by_name

WEIGHT_FILES = ("model_optim_rng.pt", "model_rng.pt")
"""The second by Megatron-LM of 2022 to 2023 with the distributed optimizer."""
_OPTIMIZER_FILES = ("optim.pt", "distrib_optim.pt")
"""Optimizer state, never opened."""
_FOLDER = re.compile(r"mp_rank_(\d{2,6})((?:_\d{3,6})*)")
_CHUNK = re.compile(r"model(\d{0,4})")
_UNUSED = (
    ("optim", "optimizer state"),
    ("rng", "random number generators"),
    ("modelopt", "quantiser state (modelopt_state)"),
)
"""What is in a name -> what its value is, where it is neither the model nor of the training run's own."""
_MOST_PICKLE_BYTES = 1 << 25  # of one rank; 10 000 tensors and their optimizer state take about 10 MB
_ZIP = b"PK\x03\x04"
_TAR_MAGIC = slice(257, 262)


class RankFile(Struct, frozen=True):
    """A training rank's file, by the numbers in the name of its folder."""

    name: str
    """Relative to the iteration folder."""
    tp: int
    suffixes: tuple[int, ...]
    """What follows the tp rank: pp rank, or ep rank, or both in this order."""


class Unused(Struct):
    """Tensors of a file that are no weights: reason -> [number, bytes]."""

    counts: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, num_bytes: int, *, number: int = 1) -> None:
        entry = self.counts.setdefault(reason, [0, 0])
        entry[0] += number
        entry[1] += num_bytes


class RankState(Struct, frozen=True):
    """What one rank saved: its model chunks as places in its file."""

    path: Path
    chunks: tuple[dict[str, Shard], ...]
    """One per virtual pipeline stage: name as saved, nested dictionaries joined with dots."""
    objects: tuple[dict[str, Shard], ...]
    """Per virtual stage: ``_extra_state`` tensors, bytes of the layer's own."""
    arguments: Mapping[str, object] | None
    iteration: object
    version: float
    """``checkpoint_version``; 0 where the file has none."""
    unused: Unused


def find_rank_files(folder: Path) -> list[RankFile]:
    """The rank files of an iteration folder, in order of their names.

    Folders with nothing but optimizer state are passed over. Raises `ExportError` for folders without a file.
    """
    faults = Faults(f"{folder}: files of training ranks are missing")
    found = []
    for path in sorted(folder.iterdir()):
        match = _FOLDER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        names = [name for name in WEIGHT_FILES if (path / name).is_file()]
        if names:
            suffixes = tuple(int(number) for number in match[2].split("_")[1:])
            found.append(RankFile(f"{path.name}/{names[0]}", int(match[1]), suffixes))
        elif not any((path / name).is_file() for name in _OPTIMIZER_FILES):
            faults.add(f"{path.name} holds no {' or '.join(WEIGHT_FILES)}; copy it again")
    faults.raise_if_any()
    return found


def has_rank_folders(folder: Path) -> bool:
    """Whether an iteration folder has ``mp_rank_`` folders."""
    return folder.is_dir() and any(_FOLDER.fullmatch(path.name) and path.is_dir() for path in folder.iterdir())


def optimizer_file_sizes(folder: Path) -> list[int]:
    """Bytes of the files that hold optimizer state only."""
    paths = (path / name for path in folder.glob("mp_rank_*") for name in _OPTIMIZER_FILES)
    return [path.stat().st_size for path in paths if path.is_file()]


def read_rank_state(path: Path, number: int) -> RankState:
    """The rank state in the file at `path`, which is `number` in the table. Reads its pickle, no storage.

    Raises `ExportError`, naming the file, when it is cut, refused or holds no model.
    """
    saved = read_saved(path)
    state = saved.value
    if not isinstance(state, Mapping):
        raise ExportError(f"{path}: holds a {type(state).__name__}, expected the dictionary that Megatron saves")
    chunks, objects, unused = [], [], Unused()
    for key in _chunk_keys(state, path):
        tensors, extra = _chunk(state[key], saved, number, unused)
        chunks.append(tensors)
        objects.append(extra)
    _count_unused(state, unused)
    return RankState(
        path=path,
        chunks=tuple(chunks),
        objects=tuple(objects),
        arguments=saved_arguments(state),
        iteration=state.get("iteration"),
        version=_version(state.get("checkpoint_version"), path),
        unused=unused,
    )


def read_member(path: Path, base: int, size: int, *, origin: str) -> SavedState:
    """The same of `size` bytes from `base` of an archive; offsets of its tensors are those in the archive."""
    try:
        with path.open("rb") as file:
            return read_state(
                lambda at, length: os.pread(file.fileno(), length, at),
                base,
                size,
                origin=origin,
                max_pickle_bytes=_MOST_PICKLE_BYTES,
            )
    except OSError as error:
        raise ExportError(f"{origin}: cannot be read: {error.strerror or error}") from error


def read_saved(path: Path) -> SavedState:
    """The object in a ``torch.save`` file of either container, by its first bytes."""
    try:
        with path.open("rb") as file:
            descriptor, length = file.fileno(), os.fstat(file.fileno()).st_size
            head = os.pread(descriptor, 512, 0)

            def read_at(position: int, size: int) -> bytes:
                return os.pread(descriptor, size, position)

            if head.startswith(MAGIC):
                return read_unzipped_state(read_at, length, origin=str(path), max_pickle_bytes=_MOST_PICKLE_BYTES)
            if head.startswith(_ZIP):
                return read_state(read_at, 0, length, origin=str(path), max_pickle_bytes=_MOST_PICKLE_BYTES)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head[_TAR_MAGIC] == b"ustar":
        raise ExportError(
            f"{path}: is a tar, which torch wrote before 0.1.10; load it with such a torch and save it with a newer one"
        )
    raise ExportError(f"{path}: was not written by torch.save, or is damaged at its start; copy it again")


def saved_arguments(state: Mapping[Any, object]) -> Mapping[str, object] | None:
    """The training arguments in a state, or None."""
    arguments = state.get("args")
    if isinstance(arguments, Record):
        arguments = arguments.state
    return arguments if isinstance(arguments, Mapping) else None


def _chunk_keys(state: Mapping[Any, object], path: Path) -> list[str]:
    """``model``, or ``model0``, ``model1``, … of virtual pipeline stages, in order."""
    numbers = {match[1]: key for key in state if isinstance(key, str) and (match := _CHUNK.fullmatch(key))}
    expected = [""] if "" in numbers else [str(n) for n in range(len(numbers))]
    if not numbers or set(numbers) != set(expected):
        found = ", ".join(map(str, state)) or "nothing"
        raise ExportError(f"{path}: expected the weights under model, or model0, model1, …; it holds {found[:300]}")
    return [numbers[number] for number in expected]


def _chunk(model: object, saved: SavedState, file: int, unused: Unused) -> tuple[dict[str, Shard], dict[str, Shard]]:
    """Tensors and ``_extra_state`` tensors of a model chunk."""
    tensors: dict[str, Shard] = {}
    extra: dict[str, Shard] = {}
    faults = Faults(f"{saved.origin}: not plain weights")
    for name, value in flat_items(model):
        is_extra = name.rpartition(".")[2] == "_extra_state"
        if "._extra_state." in name:  # a dict, of TransformerEngine 0.3 to 0.5
            unused.add("state of layers that is no weight", 0)
        elif isinstance(value, TensorRef):
            (extra if is_extra else tensors)[name] = _shard(saved, name, value, file)
        elif is_extra and value is not None:
            unused.add("state of layers that is no weight", 0)
        elif value is not None:
            what = value.kind if isinstance(value, Record) else type(value).__name__
            faults.add(f"{name} is a {what}, expected a tensor")
    faults.raise_if_any()
    return tensors, extra


def flat_items(model: object) -> Iterator[tuple[str, object]]:
    """(name, value) of a state dictionary, nested or flat; names are keys joined with dots."""
    pending: list[tuple[str, object]] = [("", model)]
    while pending:
        prefix, value = pending.pop()
        if isinstance(value, Mapping):
            inner = [(f"{prefix}.{key}" if prefix else str(key), each) for key, each in value.items()]
            pending.extend(reversed(inner))
        else:
            yield prefix, value


def _shard(saved: SavedState, name: str, ref: TensorRef, file: int) -> Shard:
    record = saved.tensor(ref, name=name)
    itemsize = dtype_by_name(record.dtype, where=f"{saved.origin}: {name}").itemsize
    shard = Shard(file, record.dtype, record.shape, record.offset, tuple(step * itemsize for step in record.strides))
    if not shard.is_readable:
        raise ExportError(
            f"{saved.origin}: {name} of shape {list(ref.shape)} has strides {list(ref.strides)}: neither its rows nor "
            "its columns are contiguous; save it again"
        )
    return shard


def _count_unused(state: Mapping[Any, object], unused: Unused) -> None:
    for key, value in state.items():
        if isinstance(key, str) and not _CHUNK.fullmatch(key):
            reason = next((reason for part, reason in _UNUSED if part in key), "training state")
            if reason != "training state":
                unused.add(reason, 0, number=0)  # named even where it holds no tensors
            for ref in tensors_in(value):
                num_bytes = dtype_by_name(ref.dtype, where=key).itemsize
                for size in ref.shape:
                    num_bytes *= size
                unused.add(reason, num_bytes)


def _version(value: object, path: Path) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExportError(f"{path}: checkpoint_version is {value!r:.80}, expected a number")
    return float(value)
