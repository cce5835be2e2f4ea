"""State dict files of NeMo 1: ``model_weights.ckpt``, one per training rank, each a flat dict of tensors.

Folders are ``mp_rank_TT`` or, with pipeline stages, ``tp_rank_TT_pp_rank_PPP`` (nemo/collections/nlp/parts/
nlp_overrides.py, `NLPSaveRestoreConnector.save_to`); a single rank's file has none. Shards are joined as those of
Megatron-LM's own legacy checkpoints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from dist_export.checkpoint import legacy
from dist_export.checkpoint.file_tree import FileTree, StoredFile
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.legacy_files import RankFile, RankState, Unused
from dist_export.checkpoint.legacy_shards import Shard
from dist_export.checkpoint.pickles import TensorRef
from dist_export.checkpoint.torch_save import SavedState, read_state
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
    states: list[RankState] = []
    numbers: dict[str, int] = {}
    for name, file in sorted(tree.files.items()):
        match = _NAME.match(name)
        if match:
            suffixes = (int(match["pp"]),) if match["pp"] else ()
            ranks.append(RankFile(file.name, int(match["mp"] or match["tp"] or 0), suffixes))
            number = numbers.setdefault(file.name, len(numbers))
            states.append(_read(tree, name, file, number=number, arguments=arguments))
    return legacy.index_of_ranks(tree.root, ranks, states).build()


def _read(
    tree: FileTree, name: str, file: StoredFile, *, number: int, arguments: Mapping[str, object]
) -> RankState:
    where = tree.where(name)
    with tree.path(file).open("rb") as stream:
        saved = read_state(
            lambda at, size: os.pread(stream.fileno(), size, at), file.base, file.size, origin=where
        )
    unused = Unused()
    return RankState(
        path=tree.root / name,
        chunks=(_tensors(saved, number, unused),),
        objects=({},),
        arguments=arguments,
        iteration=None,
        version=0.0 if arguments.get("megatron_legacy") is True else 3.0,  # query, key, value: 3 x heads, or heads x 3
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
