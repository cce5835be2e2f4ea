"""Crate folders: `crate.json` names every tensor of the model, `data.bin` holds their bytes, row-major."""

from math import prod
from pathlib import Path
from typing import Any

from dist_export.checkpoint.index import CheckpointIndex, Chunk, check_extents, readable_files
from dist_export.checkpoint.index_builder import IndexBuilder
from dist_export.checkpoint.plain_text import parse_json
from dist_export.tensors.boxes import Box
from dist_export.tensors.dtypes import dtype_by_name

FORMAT = "crate"


def is_crate(folder: Path) -> bool:
    """Whether a folder has a crate's table of contents."""
    return (folder / "crate.json").is_file()


def read_index(folder: Path) -> CheckpointIndex:
    """The chunk table; a tensor in several pieces has a `Chunk` with its own box for each."""
    builder = IndexBuilder(folder, FORMAT, chunks_are_records=False)
    file = builder.file("data.bin")
    for name, entry in _contents(folder)["tensors"].items():
        shape = tuple(entry["shape"])
        length = prod(shape) * dtype_by_name(entry["dtype"], where=name).itemsize
        builder.add(name, shape, entry["dtype"], [Chunk(Box.whole(shape), file, entry["offset"], length)])
    index = builder.build()
    check_extents(index, readable_files(index))
    return index


def read_common_state(index: CheckpointIndex) -> dict[str, object]:
    """``args`` and ``iteration``."""
    contents = _contents(index.folder)
    return {"args": contents["args"], "iteration": contents["iteration"]}


def _contents(folder: Path) -> dict[str, Any]:
    return parse_json((folder / "crate.json").read_bytes(), origin=str(folder))
