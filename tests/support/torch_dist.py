"""Any tensors as a real ``torch_dist`` checkpoint: torch.save records and torch's own metadata classes, no Megatron.

For layouts, shapes and faults that training would not produce on demand. What Megatron itself writes is covered by
`support.megatron_checkpoints`.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

COMMON_STATE = "common_state/shard_0_1"
Chunk = tuple[int, tuple[int, ...], tuple[int, ...]]
"""(training rank that writes it, start, size)."""
Chunks = Callable[[str, torch.Tensor], Iterable[Chunk]]


def write_torch_dist(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    args: dict[str, Any] | None,
    chunks: Chunks | None = None,
    common: Literal["file", "record"] = "file",
    prefix: str = "",
    extra_objects: dict[str, Any] | None = None,
) -> Path:
    """Write `tensors` (global name -> whole tensor) as an iteration folder and return it.

    `chunks` cuts a tensor (one chunk of training rank 0 without it); a tensor whose first of the last two dims is
    the contiguous one is stored so, chunk by chunk. `args` become the Namespace that Megatron saves, in common.pt or
    in a record; None saves none. `prefix` (``model.``) goes before every name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder)
    for name, tensor in tensors.items():
        stored = []
        for rank, start, size in (chunks or whole)(name, tensor):
            box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
            writer.add(rank, MetadataIndex(prefix + name, torch.Size(start)), _own_storage(tensor[box]))
            stored.append(ChunkStorageMetadata(torch.Size(start), torch.Size(size)))
        writer.entries[prefix + name] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), tensor.size(), stored
        )
    for name, value in (extra_objects or {}).items():
        writer.add_object(name, value)
    state = {"checkpoint_version": 3.0, "iteration": 10}
    if args is not None:
        state["args"] = argparse.Namespace(**args)
    if common == "file":
        torch.save(state, folder / "common.pt")
    else:
        writer.add_object(COMMON_STATE, [state])
    writer.finish(common)
    return folder


class _Writer:
    """Appends records to ``.distcp`` files and keeps where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Any] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self._sizes: dict[str, int] = {}

    def add(self, rank: int, index: MetadataIndex, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        name = f"__{rank}_0.distcp"
        offset, length = self._sizes.get(name, 0), buffer.tell()
        with (self.folder / name).open("ab") as file:
            file.write(buffer.getvalue())
        self._sizes[name] = offset + length
        self.places[index] = _StorageInfo(name, offset, length)

    def add_object(self, name: str, value: Any) -> None:
        self.entries[name] = BytesStorageMetadata()
        self.add(0, MetadataIndex(name), value)

    def finish(self, common: str) -> None:
        write_metadata(self.folder, Metadata(self.entries, None, self.places))
        about = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        if common == "file":
            about |= {"common_backend": "torch", "common_backend_version": 1}
        (self.folder / "metadata.json").write_text(json.dumps(about))


def read_metadata(folder: Path) -> Metadata:
    """``.metadata`` as torch's own classes. Only for checkpoints of these tests: it unpickles without care."""
    return pickle.loads((folder / ".metadata").read_bytes())


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Replace ``.metadata``."""
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def change_args(folder: Path, **changes: Any) -> None:
    """Edit the arguments saved in common.pt."""
    state = torch.load(folder / "common.pt", weights_only=False)
    for name, value in changes.items():
        setattr(state["args"], name, value)
    torch.save(state, folder / "common.pt")


def whole(name: str, tensor: torch.Tensor) -> Iterator[Chunk]:
    """One chunk, written by rank 0."""
    yield 0, (0,) * tensor.dim(), tuple(tensor.shape)


def grid_chunks(cuts: Callable[[str, torch.Tensor], tuple[int, ...]]) -> Chunks:
    """Chunks on a regular grid: `cuts` gives the number of parts per dim. Part i of the grid is rank i's."""

    def chunks(name: str, tensor: torch.Tensor) -> Iterator[Chunk]:
        parts = cuts(name, tensor)
        sizes = tuple(size // n for size, n in zip(tensor.shape, parts, strict=True))
        for rank, position in enumerate(torch.cartesian_prod(*map(torch.arange, parts)).reshape(-1, len(parts))):
            yield rank, tuple(int(p) * n for p, n in zip(position, sizes, strict=True)), sizes

    return chunks


def megatron_chunks(*, tp: int = 1, pp: int = 1) -> Chunks:
    """As a tp x pp training run writes: one chunk per layer and tp rank, layers in their stage's files."""

    def chunks(name: str, tensor: torch.Tensor) -> Iterator[Chunk]:
        stacked = ".layers." in name and not name.split(".layers.")[1][0].isdigit()
        num_layers = tensor.shape[0] if stacked else 1
        dim = _tensor_parallel_dim(name, tensor, stacked)
        parts = tp if dim is not None else 1
        for layer in range(num_layers):
            stage = layer * pp // num_layers if stacked else (pp - 1 if name.startswith(_LAST) else 0)
            for rank in range(parts):
                start, size = [0] * tensor.dim(), list(tensor.shape)
                if stacked:
                    start[0], size[0] = layer, 1
                if dim is not None:
                    size[dim] //= parts
                    start[dim] = rank * size[dim]
                yield stage * tp + rank, tuple(start), tuple(size)

    return chunks


_LAST = ("decoder.final_layernorm", "output_layer")
_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")
_REPLICATED = ("norm_weight", "norm_bias", "norm.weight", "norm.bias", "position_embeddings.weight")


def _tensor_parallel_dim(name: str, tensor: torch.Tensor, stacked: bool) -> int | None:
    if name.endswith(_REPLICATED) or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
        return None
    return (1 if name.endswith(_ROW_PARALLEL) else 0) + int(stacked)


def _own_storage(view: torch.Tensor) -> torch.Tensor:
    """A copy whose storage holds just the view, in the same order of dims."""
    if view.dim() >= 2 and view.stride(-2) == 1 and view.stride(-1) != 1:
        return view.transpose(-1, -2).contiguous().transpose(-1, -2)
    return view.contiguous().clone()
