"""Target files that are memory: what the executor writes becomes tensors without a file between."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from threading import Lock

import torch

from dist_export.plan.shard import ShardPlan


class MemoryFile:
    """The data section of a target file in host memory. Threads may write disjoint ranges of it."""

    def __init__(self, plan: ShardPlan) -> None:
        self.num_bytes_written = 0
        self._plan, self._header_size = plan, len(plan.header)
        self._memory = torch.zeros(plan.num_data_bytes, dtype=torch.uint8)
        self._bytes = memoryview(self._memory.numpy().data)
        self._lock = Lock()

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset of the file that this stands for."""
        start = offset - self._header_size
        self._bytes[start : start + data.nbytes] = data
        with self._lock:
            self.num_bytes_written += data.nbytes

    def tensors(self) -> dict[str, torch.Tensor]:
        """The file's tensors by name: views of one block of memory."""
        result = {}
        for planned in self._plan.tensors:
            raw = self._memory[planned.offset : planned.offset + planned.num_bytes]
            result[planned.name] = raw.view(getattr(torch, planned.dtype.name)).reshape(planned.shape)
        return result


class RoundFile:
    """Some tensors of a target file in host memory, each in memory of its own: what one round makes."""

    def __init__(self, plan: ShardPlan, indices: Iterable[int]) -> None:
        self.num_bytes_written = 0
        self._plan, self._lock = plan, Lock()
        header_size = len(plan.header)
        self._memory = {n: torch.zeros(plan.tensors[n].num_bytes, dtype=torch.uint8) for n in indices}
        self.num_bytes = sum(memory.numel() for memory in self._memory.values())
        # Offsets grow with numbers; an empty tensor shares the offset of the next one, and nothing is written to it.
        filled = [n for n in sorted(self._memory) if self._memory[n].numel()]
        self._starts = [header_size + plan.tensors[n].offset for n in filled]
        self._bytes = [memoryview(self._memory[n].numpy().data) for n in filled]

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset of the file that this stands for, within one of the round's tensors."""
        number = bisect_right(self._starts, offset) - 1
        start = offset - self._starts[number]
        self._bytes[number][start : start + data.nbytes] = data
        with self._lock:
            self.num_bytes_written += data.nbytes

    def tensor(self, index: int) -> tuple[str, torch.Tensor]:
        """Name and value of a tensor."""
        planned = self._plan.tensors[index]
        return planned.name, self._memory[index].view(getattr(torch, planned.dtype.name)).reshape(planned.shape)
