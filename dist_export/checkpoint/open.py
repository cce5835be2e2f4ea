"""Find and open the checkpoint that a person names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from dist_export.checkpoint import bridge, nemo, nemo2
from dist_export.checkpoint.adapter_settings import adapter_settings
from dist_export.checkpoint.adapters import AdapterSettings, check_whole, with_base
from dist_export.checkpoint.formats import WEIGHT_FORMATS, Format
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.index_cache import cached_index
from dist_export.checkpoint.pickles import Record
from dist_export.errors import ExportError

TRACKER = "latest_checkpointed_iteration.txt"

LAYOUT_ARGUMENTS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "cp": "context_parallel_size",
    "dp": "data_parallel_size",
}

FORMATS: tuple[Format, ...] = (
    Format(nemo.FORMAT, nemo.is_nemo, nemo.read_index, nemo.read_common_state),
    Format(nemo2.FORMAT, nemo2.is_nemo2, nemo2.read_index, nemo2.read_common_state),
    Format(bridge.FORMAT, bridge.is_bridge, bridge.read_index, bridge.read_common_state),
    *WEIGHT_FORMATS,
)
"""Every format that can be read. First match wins: containers before the weights in them."""


class Checkpoint(Struct, frozen=True):
    """A checkpoint opened for reading: its chunk table and what training saved beside the weights."""

    index: CheckpointIndex
    common: Mapping[str, object]
    adapters: AdapterSettings | None = None
    """How the adapters in the table are scaled; None where it holds none."""

    @property
    def arguments(self) -> Mapping[str, object] | None:
        """The saved arguments of the training run, or None when the checkpoint holds none."""
        arguments = self.common.get("args")
        if isinstance(arguments, Record) and isinstance(arguments.state, Mapping):
            return arguments.state
        return arguments if isinstance(arguments, Mapping) else None

    @property
    def training_layout(self) -> dict[str, int]:
        """Axis -> parallel size of the training run, as far as its arguments say."""
        arguments = self.arguments or {}
        found = {axis: arguments.get(name) for axis, name in LAYOUT_ARGUMENTS.items()}
        return {axis: size for axis, size in found.items() if isinstance(size, int)}

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and times of the files, hexadecimal: tells a changed checkpoint. Reads no data."""
        state = hashlib.sha256()
        for number, name in enumerate(self.index.files):
            try:
                status = self.index.path(number).stat()
            except OSError as error:
                raise ExportError(f"{self.index.path(number)}: {error.strerror}") from error
            state.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
        return state.hexdigest()

    @property
    def iteration(self) -> int | None:
        """The training iteration, where the checkpoint says it."""
        iteration = self.common.get("iteration")
        return iteration if isinstance(iteration, int) else None


def find_iteration(path: Path, *, iteration: int | None = None) -> Path:
    """The iteration folder behind `path`: itself, or the latest (or given) one of a ``--save`` folder.

    Raises `ExportError` when there is none; folders newer than the tracker are unfinished and not taken.
    """
    if not path.exists():
        raise ExportError(f"{path}: no such file or folder")
    if nemo.is_archive(path):
        return path
    if not path.is_dir():
        raise ExportError(
            f"{path}: not a folder and not a .nemo archive; give a Megatron --save folder or one of its iter_ folders"
        )
    if iteration is not None:
        return _numbered(path, iteration)
    if not (path / TRACKER).is_file():
        return path
    text = (path / TRACKER).read_text(errors="replace").strip()
    if text == "release":
        return _existing(path / "release", path)
    if not re.fullmatch(r"\d{1,12}", text):
        raise ExportError(f"{path / TRACKER}: holds {text[:40]!r}, expected an iteration number or the word release")
    return _numbered(path, int(text))


def open_checkpoint(
    path: Path,
    *,
    iteration: int | None = None,
    index_cache: Path | None = None,
    base: Path | None = None,
    master_weights: bool = False,
) -> Checkpoint:
    """Open the checkpoint at `path` by looking at what is there. Reads metadata only, never weights.

    With `index_cache` the chunk table (that of `base`, where given) is taken from that file, or kept there for the next
    time. `base` is the model that the adapters at `path` belong to. With `master_weights` the tensors are the fp32
    weights out of the optimizer's state, which is read anew each time.

    Raises `ExportError` when it is not a checkpoint, not of a known format, unfinished or damaged, when it holds
    nothing but adapters and `base` is not given, and when it has no master weights in the model's shapes.
    """
    folder = find_iteration(path, iteration=iteration)
    if base is not None and master_weights:
        raise ExportError("--base and --master-weights exclude each other: adapters were trained on the base's weights")
    if base is not None:
        known = _format_of(folder)
        adapters, base_folder = known.read_index(folder), find_iteration(base)
        table = with_base(
            adapters,
            _read_index(base_folder, index_cache),
            iteration=known.read_common(adapters).get("iteration"),
        )
        return checkpoint_of(table)
    index = _with_master_weights(folder) if master_weights else _read_index(folder, index_cache)
    check_whole(index)
    return checkpoint_of(index)


def checkpoint_of(index: CheckpointIndex) -> Checkpoint:
    """The checkpoint that a chunk table is of: reads what training saved beside the weights."""
    name = index.format.partition(" (")[0]
    known = next(each for each in FORMATS if each.name == name)
    common = known.read_common(index)
    if index.adapters is not None:
        common = {**common, "iteration": index.adapters["iteration"]}
    return Checkpoint(index, common, adapter_settings(index))


def _format_of(folder: Path) -> Format:
    for known in FORMATS:
        if known.recognises(folder):
            return known
    raise ExportError(_unrecognised(folder))


def _with_master_weights(folder: Path) -> CheckpointIndex:
    from dist_export.checkpoint.master_weights import with_master_weights

    return with_master_weights(_read_index(folder, None))


def _read_index(folder: Path, cache: Path | None) -> CheckpointIndex:
    read = _format_of(folder).read_index
    return cached_index(folder, cache, read) if cache else read(folder)


def _numbered(path: Path, iteration: int) -> Path:
    return _existing(path / f"iter_{iteration:07d}", path)


def _existing(folder: Path, path: Path) -> Path:
    if folder.is_dir():
        return folder
    there = sorted(p.name for p in path.glob("iter_*") if p.is_dir())
    raise ExportError(f"{folder}: no such folder; {path} holds {', '.join(there) or 'no iterations'}")


def _unrecognised(folder: Path) -> str:
    names = {p.name for p in folder.iterdir()}
    if "metadata.json" in names:
        return f"{folder}: metadata.json names no format that can be read; torch_dist and zarr can"
    if any(name.startswith("mp_rank_") for name in names):
        return f"{folder}: has mp_rank_ names as a legacy checkpoint, but no folder mp_rank_TT of a training rank"
    return f"{folder}: not a Megatron checkpoint (no {TRACKER}, no metadata.json)"
