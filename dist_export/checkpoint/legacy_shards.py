"""Pieces of tensors in legacy files, and how they join into global tensors: arithmetic on places, nothing is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from dist_export.errors import ExportError
from dist_export.tensors.boxes import Box, Shape, row_major_strides
from dist_export.tensors.dtypes import dtype_by_name


class Shard(Struct, frozen=True):
    """A strided tensor in a file: element (i, j, …) begins at offset + i * strides[0] + j * strides[1] + …."""

    file: int
    """Number of the file in the table."""
    dtype: str
    shape: Shape
    offset: int  # bytes from the start of the file
    strides: Shape  # bytes

    @property
    def itemsize(self) -> int:
        return dtype_by_name(self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        size = self.itemsize
        for n in self.shape:
            size *= n
        return size

    @property
    def is_row_major(self) -> bool:
        """Whether its elements lie side by side in the order of their indices."""
        return self.plain_strides == tuple(step * self.itemsize for step in row_major_strides(self.shape))

    @property
    def plain_strides(self) -> Shape:
        """Strides with those along dims of one element, which mean nothing, as a row-major tensor has them."""
        packed = row_major_strides(self.shape)
        return tuple(
            step if size > 1 else plain * self.itemsize
            for step, size, plain in zip(self.strides, self.shape, packed, strict=True)
        )

    @property
    def is_readable(self) -> bool:
        """Whether it is a vector, or a matrix whose rows or whose columns are contiguous."""
        if len(self.shape) != 2:
            return len(self.shape) < 2 or self.is_row_major
        (num_rows, num_columns), (down, across) = self.shape, self.plain_strides
        by_rows = across == self.itemsize and (num_rows == 1 or down >= num_columns * self.itemsize)
        by_columns = down == self.itemsize and (num_columns == 1 or across >= num_rows * self.itemsize)
        return by_rows or by_columns

    def narrow(self, dim: int, start: int, size: int, *, step: int = 1) -> Shard:
        """`size` indices of a dim, from `start` on, every `step`-th."""
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = size, step * self.strides[dim]
        return replace(
            self, shape=tuple(shape), strides=tuple(strides), offset=self.offset + start * self.strides[dim]
        )

    def select(self, index: int) -> Shard:
        """One index of dim 0, which goes away."""
        offset = self.offset + index * self.strides[0]
        return replace(self, shape=self.shape[1:], strides=self.strides[1:], offset=offset)

    def reshaped(self, shape: Shape) -> Shard:
        """The same memory as another shape. It must be row-major."""
        assert self.is_row_major, f"{self} has no memory of its own"
        return replace(self, shape=shape, strides=tuple(step * self.itemsize for step in row_major_strides(shape)))

    def transposed(self) -> Shard:
        """With its two dims exchanged."""
        return replace(self, shape=self.shape[::-1], strides=self.strides[::-1])


Blocks = tuple[Shard, ...]
"""One rank's tensor: shards joined along dim 0. Most are a single shard."""


class Joined(Struct, frozen=True):
    """A global tensor made of shards, each with its box."""

    shape: Shape
    dtype: str
    boxes: tuple[Box, ...]
    shards: tuple[Shard, ...]


def joined_along(dim: int, shards: Iterable[Shard]) -> Joined:
    """Shards laid one behind the other along `dim`."""
    parts, position, boxes = tuple(shards), 0, []
    for shard in parts:
        start = [0] * len(shard.shape)
        if start:
            start[dim] = position
            position += shard.shape[dim]
        boxes.append(Box(tuple(start), shard.shape))
    shape = list(parts[0].shape)
    if shape:
        shape[dim] = position
    return Joined(tuple(shape), parts[0].dtype, tuple(boxes), parts)


def halves(ranks: Sequence[Shard]) -> list[Shard]:
    """The gate halves of all tp ranks, then the up halves: each rank's fc1 is ``[gate; up]`` of its own."""
    rows = [shard.shape[0] for shard in ranks]
    gates = [shard.narrow(0, 0, size // 2) for shard, size in zip(ranks, rows, strict=True)]
    ups = [shard.narrow(0, size // 2, size // 2) for shard, size in zip(ranks, rows, strict=True)]
    return [*gates, *ups]


def reordered_qkv(shard: Shard, version: float, num_heads: int | None, *, where: str) -> Blocks:
    """A rank's fused q, k, v rows in the order ``[heads, 3, head size]`` of checkpoint_version 2.0 and later.

    Version 0 has ``[3, heads, head size]`` and version 1.0 ``[heads, head size, 3]`` (Megatron-LM,
    ``fix_query_key_value_ordering``); both are older than grouped queries. `num_heads` are those of the rank.
    """
    if version >= 2.0:
        return (shard,)
    if version not in (0, 1.0):
        raise ExportError(f"{where}: the row order of checkpoint_version {version} is not known (0, 1.0, 2.0, 3.0 are)")
    rows = shard.shape[0]
    if num_heads is None:
        raise ExportError(
            f"{where}: rows of checkpoint_version {version:g} are ordered by head, and the file does not say how many "
            "heads there are; save it again with its Megatron-LM, which then writes its arguments"
        )
    if num_heads < 1 or rows % (3 * num_heads):
        raise ExportError(f"{where}: {rows} rows are not 3 x {num_heads} heads of a rank x a head size")
    size = rows // (3 * num_heads)
    if version == 0:
        return tuple(
            shard.narrow(0, (part * num_heads + head) * size, size) for head in range(num_heads) for part in range(3)
        )
    return tuple(
        shard.narrow(0, head * size * 3 + part, size, step=3) for head in range(num_heads) for part in range(3)
    )
