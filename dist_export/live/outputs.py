"""Target files that are memory: what the executor writes becomes tensors without a file between."""

from __future__ import annotations

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
