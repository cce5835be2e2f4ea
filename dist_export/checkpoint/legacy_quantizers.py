"""How tp ranks share the tensors of ModelOpt's quantisers in legacy files, and joining them as ``torch_dist`` has them.

In a rank's state dict an amax of blocks is flat (``[rows x blocks, 1]``) and one of a whole tensor has no dims; what a
row-parallel linear has per input channel is split with its columns (modelopt/torch/quantization/plugins/megatron.py).
The joined tensors keep the order of the ranks, that of a gated fc1 too (rank 0's gate and up, then rank 1's).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dist_export.checkpoint.legacy_names import Split, split_of
from dist_export.checkpoint.legacy_shards import Joined, Shard, joined_along
from dist_export.checkpoint.quantizer_names import Quantity, Quantizer, quantizer_tensor
from dist_export.errors import ExportError

ReadShard = Callable[[Shard], bytes]
"""The bytes of a shard; raises `ExportError`."""

_LARGEST_BLOCK = 128
"""Columns of the widest blocks that ModelOpt's configurations have."""
_SCATTERED = "its elements do not lie side by side; save it again"
_PER_CHANNEL = (Quantity.AMAX, Quantity.SCALE)
_KNOWN = (*_PER_CHANNEL, Quantity.PRE_QUANT_SCALE, Quantity.DOUBLE_SCALE, Quantity.GLOBAL_AMAX)


def weight_of(name: str) -> str | None:
    """The weight of the linear that a quantiser's tensor belongs to; None for a tensor that is of no quantiser."""
    if quantizer_tensor(name) is None:
        return None
    return f"{name[: name.index('quantizer')].rpartition('.')[0]}.weight"


def shard_reader(paths: Sequence[Path]) -> ReadShard:
    """Reads shards from these files, which are numbered as they are given."""

    def read(shard: Shard) -> bytes:
        path = paths[shard.file]
        if not shard.is_row_major:
            raise ExportError(f"{path}: {_SCATTERED}")
        try:
            with path.open("rb") as file:
                data = os.pread(file.fileno(), shard.num_bytes, shard.offset)
        except OSError as error:
            raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
        if len(data) != shard.num_bytes:
            raise ExportError(f"{path}: is cut: {shard.num_bytes} bytes wanted at {shard.offset}")
        return data

    return read


def joined_quantizer(
    name: str, ranks: Sequence[Shard], beside: Mapping[str, Sequence[Shard]], read: ReadShard, *, where: str
) -> Joined:
    """The tensor `name` of which each tp rank has a shard; `beside` are the other tensors of the first rank.

    Raises `ExportError` for tensors of which the ranks must have the same and do not, and for shapes and buffers that
    no quantiser of a known linear has.
    """
    shard, found, weight_name = ranks[0], quantizer_tensor(name), weight_of(name)
    assert found is not None and weight_name is not None, f"{name} is of a quantiser"
    if math.prod(shard.shape) == 1:
        return _replicated(ranks, read, where)
    split = split_of(weight_name)
    if split is None or found.quantity not in _KNOWN:
        raise ExportError(f"{where}: how tp ranks share this tensor is not known, so its shards cannot be joined")
    if found.quantity is Quantity.PRE_QUANT_SCALE and len(shard.shape) == 1:
        return joined_along(0, ranks) if split is Split.COLUMNS else _replicated(ranks, read, where)
    if found.quantizer is not Quantizer.WEIGHT or found.quantity not in _PER_CHANNEL or len(shard.shape) != 2:
        raise ExportError(f"{where}: has shape {list(shard.shape)}, expected a single number")
    weight = next(iter(beside.get(weight_name, ())), None)
    if weight is None or len(weight.shape) != 2:
        raise ExportError(f"{where}: there is no {weight_name} beside it, so its rows are not known")
    return _of_rows(ranks, split, weight, read, where=where, own=found.quantity is Quantity.SCALE)


def _of_rows(ranks: Sequence[Shard], split: Split, weight: Shard, read: ReadShard, *, where: str, own: bool) -> Joined:
    """Numbers of rows or of blocks of columns, ``[rows, n]`` or flat. `own`: scales of codes, of which a row-parallel
    rank has its own for each row (``torch_dist`` keeps a column per rank, too)."""
    shape, (rows, columns) = ranks[0].shape, weight.shape
    dim = 1 if split is Split.COLUMNS else 0
    if shape[1] == 1 and shape[0] != rows and shape[0] % rows == 0:
        ranks = [_reshaped(each, (rows, shape[0] // rows), where) for each in ranks]
    elif shape[0] != rows:
        raise ExportError(f"{where}: has shape {list(shape)} beside a weight of {rows} rows")
    if split is Split.REPLICATED:
        return _replicated(ranks, read, where)
    # One number per row of a row-parallel linear: of the whole row, or of a block as wide as the rank's columns.
    if dim == 0 or own or ranks[0].shape[1] > 1 or (columns <= _LARGEST_BLOCK and _difference(ranks, read) is not None):
        return joined_along(dim, ranks)
    return _replicated(ranks, read, where)


def _reshaped(shard: Shard, shape: tuple[int, int], where: str) -> Shard:
    if not shard.is_row_major:
        raise ExportError(f"{where}: {_SCATTERED}")
    return shard.reshaped(shape)


def _replicated(ranks: Sequence[Shard], read: ReadShard, where: str) -> Joined:
    """What every rank must have alike."""
    other = _difference(ranks, read)
    if other is not None:
        raise ExportError(
            f"{where}: tp rank 0 and tp rank {other} have different values of what ModelOpt keeps equal; "
            "calibrate the model again"
        )
    return joined_along(0, ranks[:1])


def _difference(ranks: Sequence[Shard], read: ReadShard) -> int | None:
    """The first rank that has other bytes than rank 0."""
    if len(ranks) == 1:
        return None
    first = read(ranks[0])
    return next((rank for rank, shard in enumerate(ranks[1:], 1) if read(shard) != first), None)
