"""The states of many ranks' files (`legacy`, NeMo 1's ``.ckpt``), parsed by processes of their own.

Which is how every real checkpoint is read; only where all files together are small does this process parse them.
What crosses is places of weights and the saved arguments: optimizer state costs the parsing processes alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

from dist_export.checkpoint.hand_over import pack, unpack
from dist_export.checkpoint.isolation import IN_PROCESS_BYTES, Item, ParseLimits, in_child
from dist_export.checkpoint.legacy_files import RankState, Unused, read_rank_state, read_saved
from dist_export.checkpoint.legacy_shards import Shard
from dist_export.errors import ExportError

MOST_PICKLE_BYTES = 1 << 25
"""Bytes of one rank's pickle that are accepted: more of a file is weights."""
_MOST_CHILDREN, _FEWEST_FILES = 8, 4  # processes; files of each
_CHUNKED = ("chunks", "objects")
_shard_fields = attrgetter(*Shard.__struct_fields__)


def read_rank_states(paths: Sequence[Path]) -> list[RankState]:
    """The rank states in legacy files, numbered as they are given. Raises `ExportError` as `read_rank_state` does."""
    sizes = [_size(path) for path in paths]
    if sum(sizes) <= IN_PROCESS_BYTES:
        return [read_rank_state(path, number) for number, path in enumerate(paths)]
    items: list[Item] = [[str(path.absolute()), number] for number, path in enumerate(paths)]
    return states_in_child(packed_rank_state, items, names=list(map(str, paths)), sizes=sizes)


def read_saved_keys(path: Path, keys: Sequence[str]) -> Mapping[str, object]:
    """Some entries of the dictionary in a legacy file, without those that it lacks."""
    size = _size(path)
    if size <= IN_PROCESS_BYTES:
        return _chosen(path, keys)
    items: list[Item] = [[str(path.absolute()), *keys]]
    (result,) = in_child(packed_keys, items, names=[str(path)], limits=limits_of([size]))
    found: Mapping[str, object] = unpack(result, origin=str(path))
    return found


def states_in_child(
    function: Callable[..., bytes], items: Sequence[Item], *, names: Sequence[str], sizes: Sequence[int]
) -> list[RankState]:
    """The states that `function` (`in_child`) packs (`pack_state`); many files are divided among a few processes."""
    limits = limits_of(sizes)

    def read(part: slice) -> list[RankState]:
        results = in_child(function, items[part], names=names[part], limits=limits)
        return [_unpacked_state(result, name) for result, name in zip(results, names[part], strict=True)]

    step = max(-(-len(items) // min(len(os.sched_getaffinity(0)), _MOST_CHILDREN)), _FEWEST_FILES)
    parts = [slice(start, start + step) for start in range(0, len(items), step)]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [state for states in pool.map(read, parts) for state in states]


def limits_of(sizes: Sequence[int]) -> ParseLimits:
    """Limits for files of these sizes, of which the largest counts."""
    return ParseLimits.for_size(min(max(sizes), MOST_PICKLE_BYTES))


def packed_rank_state(path: str, number: int) -> bytes:
    """In the child: the state of a legacy file."""
    return pack_state(read_rank_state(Path(path), number))


def packed_keys(path: str, *keys: str) -> bytes:
    """In the child: some entries of a legacy file."""
    return pack(_chosen(Path(path), keys), origin=path)


def _chosen(path: Path, keys: Sequence[str]) -> dict[str, object]:
    state = read_saved(path).value
    if not isinstance(state, Mapping):
        raise ExportError(f"{path}: holds a {type(state).__name__}, expected the dictionary that Megatron saves")
    return {key: state[key] for key in keys if key in state}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error


def pack_state(state: RankState) -> bytes:
    """A rank state as bytes."""
    content = {name: getattr(state, name) for name in RankState.__struct_fields__}
    content |= {name: [_plain(chunk) for chunk in content[name]] for name in _CHUNKED}
    content |= {"path": str(state.path), "unused": state.unused.counts}
    return pack(content, origin=str(state.path))


def _unpacked_state(data: memoryview, name: str) -> RankState:
    content = unpack(data, origin=name)
    content |= {name: tuple(map(_shards, content[name])) for name in _CHUNKED}
    return RankState(**content | {"path": Path(content["path"]), "unused": Unused(content["unused"])})


def _plain(chunk: Mapping[str, Shard]) -> dict[str, tuple[Any, ...]]:
    return {name: _shard_fields(shard) for name, shard in chunk.items()}


def _shards(chunk: Mapping[str, tuple[Any, ...]]) -> dict[str, Shard]:
    return {name: Shard(*values) for name, values in chunk.items()}
