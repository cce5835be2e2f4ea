"""A rank's tensors as an address space: what a live model has in place of a file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch

from dist_export.checkpoint.index import ObjectRecord
from dist_export.errors import ExportError
from dist_export.live.table import ObjectEntry
from dist_export.tensors.boxes import Shape

ALIGNMENT = 64  # bytes
_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RankMemory:
    """Tensors of this process by address. Holds references: nothing is copied but tensors that are not contiguous.

    Tensors may be on any device. They must not be written while an export runs.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._flat: list[torch.Tensor] = []  # uint8
        self._end = 0

    @property
    def num_bytes(self) -> int:
        """The end of the address space."""
        return self._end

    @property
    def device(self) -> torch.device:
        """Where the tensors are: that of the first which is not on the CPU, as what layers saved always is."""
        return next((flat.device for flat in self._flat if flat.device.type != "cpu"), torch.device("cpu"))

    def settle(self) -> None:
        """Wait until nothing writes the tensors any more. The caller's CUDA stream may; threads read on others."""
        for device in {flat.device for flat in self._flat if flat.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def add(self, tensor: torch.Tensor) -> int:
        """The address that a tensor's first byte gets."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        start = self._end
        self._starts.append(start)
        self._flat.append(flat)
        self._end += -(-max(flat.numel(), 1) // ALIGNMENT) * ALIGNMENT
        return start

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer` from an address on, which lies in one tensor together with all that follows."""
        flat, offset = self._find(address, buffer.nbytes)
        target = torch.frombuffer(buffer, dtype=torch.uint8)
        target.copy_(flat[offset : offset + buffer.nbytes])

    def elements(self, address: int, itemsize: int, shape: Shape, strides: Shape) -> torch.Tensor:
        """A view of elements from an address on, as integers of `itemsize` bytes. `strides` are in bytes."""
        last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        flat, offset = self._find(address, last + itemsize)
        steps = tuple(step // itemsize for step in strides)
        typed = flat.view(_OF_SIZE[itemsize])
        return typed.as_strided(shape, steps, typed.storage_offset() + offset // itemsize)

    def _find(self, address: int, num_bytes: int) -> tuple[torch.Tensor, int]:
        """The tensor at an address, and the offset in it."""
        number = bisect_right(self._starts, address) - 1
        flat = self._flat[number]
        offset = address - self._starts[number]
        assert offset >= 0 and offset + num_bytes <= flat.numel(), f"{num_bytes} bytes at {address} are no tensor's"
        return flat, offset


def dtype_name(tensor: torch.Tensor) -> str:
    """``bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


def check_tensor(name: str, value: Any) -> torch.Tensor:
    """`value` when it is a dense tensor with memory of its own; `ExportError` naming it otherwise."""
    if not isinstance(value, torch.Tensor):
        raise ExportError(f"{name} is a {type(value).__name__}, expected a tensor")
    local = getattr(value, "_local_tensor", None)
    if local is not None:
        raise ExportError(f"{name} is a DTensor: give the state of the model before it was wrapped by FSDP")
    if value.is_meta or value.layout is not torch.strided:
        raise ExportError(f"{name} has no memory (device {value.device}, layout {value.layout}): load the model first")
    return value


def object_entries(name: str, value: Any, memory: RankMemory) -> list[ObjectEntry]:
    """What a layer saved, kept in `memory`; nothing for layers that save nothing.

    TransformerEngine saves bytes: in a uint8 tensor from 2.0 on, in an ``io.BytesIO`` before. Raises `ExportError`.
    """
    if hasattr(value, "getvalue"):
        value = torch.frombuffer(bytearray(value.getvalue()), dtype=torch.uint8) if value.getvalue() else None
    if value is None or (isinstance(value, torch.Tensor) and value.numel() == 0):
        return []
    tensor = check_tensor(name, value)
    if tensor.dtype is not torch.uint8:
        raise ExportError(f"{name} holds {dtype_name(tensor)}, expected bytes")
    return [ObjectEntry(name, memory.add(tensor.cpu()), tensor.numel())]


def read_objects(objects: Mapping[str, ObjectRecord], own: set[int], memory: RankMemory) -> dict[str, bytes]:
    """The bytes of those objects of a table that lie in this rank's memory: files `own`."""
    found = {}
    for name, record in objects.items():
        if record.file in own:
            buffer = bytearray(record.length)
            memory.read_into(record.offset, memoryview(buffer))
            found[name] = bytes(buffer)
    return found
