"""State dict files of NeMo 1: ``model_weights.ckpt``, one per training rank, each a flat dict of tensors.

Folders are ``mp_rank_TT`` or, with pipeline stages, ``tp_rank_TT_pp_rank_PPP`` (nemo/collections/nlp/parts/
nlp_overrides.py, `NLPSaveRestoreConnector.save_to`); a single rank's file has none. Shards are joined as those of
Megatron-LM's own legacy checkpoints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from dist_export.checkpoint import legacy
from dist_export.checkpoint.file_tree import FileTree, StoredFile
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.isolation import IN_PROCESS_BYTES, Item
from dist_export.checkpoint.legacy_files import RankFile, RankState, Unused, read_member
from dist_export.checkpoint.legacy_shards import Shard
from dist_export.checkpoint.pickles import TensorRef
from dist_export.checkpoint.rank_states import pack_state, states_in_child
from dist_export.checkpoint.torch_save import SavedState
from dist_export.errors import ExportError, Faults
from dist_export.tensors.dtypes import dtype_by_name

_NAME = re.compile(
    r"^(?:(?:mp_rank_(?P<mp>\d{2,4})|tp_rank_(?P<tp>\d{2,4})_pp_rank_(?P<pp>\d{3,4}))/)?model_weights\.ckpt$"
)
_COMPILED = "._orig_mod"
"""What torch.compile puts into names (`NLPSaveRestoreConnector.modify_state_dict`)."""


def has_rank_files(tree: FileTree) -> bool:
    """Whether the weights are state dict files."""
    return any(_NAME.match(name) for name in tree.files)


def read_rank_files(tree: FileTree, arguments: Mapping[str, object]) -> CheckpointIndex:
    """The chunk table of all ranks' files. `arguments` are those of model_config.yaml.

    Raises `ExportError` as `legacy.index_of_ranks` does, and for files that are no flat dicts of tensors.
    """
    ranks: list[RankFile] = []
    files: list[_Weights] = []
    numbers: dict[str, int] = {}
    for name, file in sorted(tree.files.items()):
        match = _NAME.match(name)
        if match:
            suffixes = (int(match["pp"]),) if match["pp"] else ()
            ranks.append(RankFile(file.name, int(match["mp"] or match["tp"] or 0), suffixes))
            files.append(_Weights(str(tree.root), name, file, numbers.setdefault(file.name, len(numbers))))
    # Rows of query, key and value: 3 x heads, or heads x 3.
    version = 0.0 if arguments.get("megatron_legacy") is True else 3.0
    states = [replace(state, arguments=arguments, version=version) for state in _states(files)]
    return legacy.index_of_ranks(tree.root, ranks, states).build()


class _Weights(Struct, frozen=True):
    """A state dict file."""

    root: str
    """The folder or the archive."""
    name: str
    file: StoredFile
    number: int
    """Of the file in the table that holds it: of an archive's there is one."""

    @property
    def where(self) -> str:
        return f"{self.root}: {self.name}"


def _states(files: Sequence[_Weights]) -> list[RankState]:
    sizes = [each.file.size for each in files]
    if sum(sizes) <= IN_PROCESS_BYTES:
        return [_read(each) for each in files]
    items: list[Item] = [
        [os.path.abspath(each.root), each.name, each.file.name, each.file.base, each.file.size, each.number]
        for each in files
    ]
    return states_in_child(packed_weights, items, names=[each.where for each in files], sizes=sizes)


def packed_weights(root: str, name: str, stored_name: str, base: int, size: int, number: int) -> bytes:
    """In the child of `isolation`: the state of one file."""
    return pack_state(_read(_Weights(root, name, StoredFile(stored_name, base, size), number)))


def _read(weights: _Weights) -> RankState:
    file, root = weights.file, Path(weights.root)
    saved = read_member(root / file.name, file.base, file.size, origin=weights.where)
    unused = Unused()
    return RankState(
        path=root / weights.name,
        chunks=(_tensors(saved, weights.number, unused),),
        objects=({},),
        arguments=None,
        iteration=None,
        version=3.0,
        unused=unused,
    )


def _tensors(saved: SavedState, number: int, unused: Unused) -> dict[str, Shard]:
    if not isinstance(saved.value, Mapping):
        raise ExportError(f"{saved.origin}: holds a {type(saved.value).__name__}, expected a dictionary of tensors")
    found: dict[str, Shard] = {}
    faults = Faults(f"{saved.origin}: not plain weights")
    for key, value in saved.value.items():
        name = str(key).replace(_COMPILED, "")
        if name.endswith("_extra_state"):
            unused.add("state of layers that is no weight", 0)
        elif not isinstance(value, TensorRef):
            faults.add(f"{name} is a {type(value).__name__}, expected a tensor")
        else:
            found[name] = _shard(saved, name, value, number)
    faults.raise_if_any()
    return found


def _shard(saved: SavedState, name: str, ref: TensorRef, number: int) -> Shard:
    record = saved.tensor(ref, name=name)
    itemsize = dtype_by_name(record.dtype, where=f"{saved.origin}: {name}").itemsize
    strides = tuple(step * itemsize for step in record.strides)
    shard = Shard(number, record.dtype, record.shape, record.offset, strides)
    if not shard.is_readable:
        raise ExportError(
            f"{saved.origin}: {name} has shape {list(ref.shape)} and strides {list(ref.strides)}: neither its rows nor "
            "its columns are contiguous; save it again"
        )
    return shard
