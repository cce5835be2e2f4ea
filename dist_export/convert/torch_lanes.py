"""Ways through a device: a block of elements goes to it, is worked on there, and comes back while others are under way.

On a GPU a block takes three streams (to the device, work, from the device) that events tie together, so that copies in
both directions and kernels run at once and nothing waits for the device but the thread that needs a result. Its memory,
pinned on the host, is made once and used again. On a CPU the work is done on the spot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct, field

from dist_export.errors import ExportError
from dist_export.tensors.dtypes import DType

Bytes = npt.NDArray[np.uint8]
Pending = AbstractContextManager[Bytes]
"""Entered, it waits for the result and checks it; left, it gives the memory of the result back."""
Work = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""From a block on the device to results on the device. It must not ask for a value there: that would wait."""
Finish = Callable[[Sequence[Bytes]], Bytes]
"""From the bytes of the results, on the host, to those of the target; raises `ExportError` for what is wrong."""

BLOCKS_IN_FLIGHT = 2
"""Per thread, on a GPU: one on its way there or back while another is worked on."""
DEVICE_MEMORY = 2 << 30
"""Bytes of a GPU that are used unless more or less is asked for."""
_ALIGNMENT = 64  # bytes between results in a buffer
_AT_ONCE = 64 << 10  # bytes that CUDA takes out of ordinary memory without waiting for the stream


class Lanes(Protocol):
    """What arithmetic runs on. Any thread may use it."""

    @property
    def in_flight(self) -> int:
        """How many blocks of a thread may be under way while it sends another."""

    def send(self, block: npt.NDArray[Any], dtype: DType, work: Work, finish: Finish) -> Pending:
        """Begin with a block ``[rows, columns]`` of raw elements (unsigned integers) of an element type. The block may
        be overwritten when this returns. A thread takes its results in the order in which it sent the blocks."""

    def constant(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """A few values on the device, for use in a `Work`."""


def share_cores(num_threads: int) -> None:
    """Let operations of this process, in threads that begin from now on, take so many threads each; fewer if the
    environment (OMP_NUM_THREADS) says so."""
    torch.set_num_threads(min(num_threads, torch.get_num_threads()))


class HostLanes:
    """A CPU."""

    in_flight = 0

    def send(self, block: npt.NDArray[Any], dtype: DType, work: Work, finish: Finish) -> Pending:
        """As `Lanes`; the result is there when this returns."""
        results = work(as_torch(np.ascontiguousarray(block), dtype))
        return nullcontext(finish([_flat(result).numpy() for result in results]))

    def constant(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """As `Lanes`."""
        return torch.from_numpy(np.ascontiguousarray(values))


def _nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _event() -> torch.cuda.Event:
    """One that a thread waits for asleep, not in a loop."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


class _Place(Struct):
    """The memory and the events of one block under way."""

    host_in: torch.Tensor = field(default_factory=_nothing)
    device_in: torch.Tensor = field(default_factory=_nothing)
    host_out: torch.Tensor = field(default_factory=_nothing)
    arrived: torch.cuda.Event = field(default_factory=_event)
    done: torch.cuda.Event = field(default_factory=_event)
    back: torch.cuda.Event = field(default_factory=_event)
    results: list[torch.Tensor] = field(default_factory=list)
    """Kept until they are on the host: freed before, their memory could be used again too early."""
    is_free: bool = True


class _Ring(Struct):
    """A thread's places, taken in turn."""

    places: list[_Place]
    next: int = 0

    def take(self) -> _Place:
        place = self.places[self.next]
        self.next = (self.next + 1) % len(self.places)
        assert place.is_free, "more blocks are under way than there are places"
        return place


class CudaLanes:
    """A GPU, with its number. `num_bytes` bounds what torch allocates there for this process."""

    in_flight = BLOCKS_IN_FLIGHT

    def __init__(self, device: str, *, num_bytes: int) -> None:
        self._device, self._num_bytes = torch.device(device), num_bytes
        try:
            total = torch.cuda.get_device_properties(self._device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(num_bytes / total, 1.0), self._device)
            self._there, self._work, self._back = (
                torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
                for _ in range(3)
            )
        except RuntimeError as error:  # CUDA's own: the memory is full, or another process has the GPU to itself
            cause = str(error).partition("\n")[0]
            raise ExportError(
                f"{device}: CUDA does not start there ({cause}); see in nvidia-smi whether it is "
                "free and its compute mode allows several processes, or use --device cpu"
            ) from error
        self._rings = threading.local()

    def constant(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """As `Lanes`: a copy in the order of the current stream, which is that of the work."""
        host = torch.from_numpy(np.ascontiguousarray(values))
        if host.nbytes > _AT_ONCE:  # torch keeps pinned memory from being used again before it is copied
            host = _pinned(host.nbytes).view(host.dtype).reshape(host.shape).copy_(host)
        return host.to(self._device, non_blocking=True)

    def send(self, block: npt.NDArray[Any], dtype: DType, work: Work, finish: Finish) -> Pending:
        """As `Lanes`. Raises `ExportError` where the device has too little memory."""
        place = self._ring().take()
        try:
            self._begin(place, block, dtype, work)
        except torch.cuda.OutOfMemoryError as error:
            raise ExportError(
                f"{self._device}: the conversion needs more than the {self._num_bytes} bytes of --device-memory, or "
                "than is free; allow it more, use fewer --num-threads, or --device cpu"
            ) from error
        return _landing(place, finish)

    def _ring(self) -> _Ring:
        ring: _Ring | None = getattr(self._rings, "ring", None)
        if ring is None:
            torch.cuda.set_device(self._device)  # of this thread: leaving a stream goes back to it, and starts it
            ring = self._rings.ring = _Ring([_Place() for _ in range(self.in_flight + 1)])
        return ring

    def _begin(self, place: _Place, block: npt.NDArray[Any], dtype: DType, work: Work) -> None:
        size = block.nbytes
        with torch.cuda.stream(self._there):
            if place.host_in.numel() < size:
                place.host_in = _pinned(size)
                place.device_in = torch.empty(size, dtype=torch.uint8, device=self._device)
            np.copyto(place.host_in[:size].numpy().view(block.dtype).reshape(block.shape), block)
            place.device_in[:size].copy_(place.host_in[:size], non_blocking=True)
            place.arrived.record(self._there)
        with torch.cuda.stream(self._work):
            self._work.wait_event(place.arrived)
            elements = place.device_in[:size].view(getattr(torch, dtype.name)).reshape(block.shape)
            place.results = [_flat(result) for result in work(elements)]
            place.done.record(self._work)
        starts = _starts(place.results)
        if place.host_out.numel() < starts[-1]:
            place.host_out = _pinned(starts[-1])
        with torch.cuda.stream(self._back):
            self._back.wait_event(place.done)
            for start, result in zip(starts, place.results, strict=False):
                place.host_out[start : start + result.numel()].copy_(result, non_blocking=True)
            place.back.record(self._back)
        place.is_free = False


@contextmanager
def _landing(place: _Place, finish: Finish) -> Iterator[Bytes]:
    """The result of the block at `place`, once it is on the host."""
    place.back.synchronize()
    starts, sizes = _starts(place.results), [result.numel() for result in place.results]
    place.results.clear()
    try:
        yield finish([place.host_out[a : a + size].numpy() for a, size in zip(starts, sizes, strict=False)])
    finally:
        place.is_free = True


def _pinned(size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise ExportError(
            f"cannot pin {size} bytes of memory for a GPU ({error}); lower --host-memory or --num-threads, raise the "
            "limit of locked memory, or use --device cpu"
        ) from error


def _starts(results: Sequence[torch.Tensor]) -> list[int]:
    """Where each of the results begins in a buffer, and where all of them end."""
    starts = [0]
    for result in results:
        starts.append(starts[-1] + -(-result.numel() // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in a row."""
    contiguous = tensor.contiguous()
    # A contiguous tensor of one element may have any stride, which view refuses.
    return contiguous.as_strided((contiguous.numel(),), (1,)).view(torch.uint8)


def as_torch(block: npt.NDArray[Any], dtype: DType) -> torch.Tensor:
    """The same memory as a tensor of an element type."""
    signed = block.view(f"i{dtype.itemsize}") if dtype.itemsize > 1 else block
    return torch.from_numpy(signed).view(getattr(torch, dtype.name))


def lanes_on(device: str, *, device_memory: int = DEVICE_MEMORY) -> Lanes:
    """The way through a torch device; on a GPU with at most `device_memory` bytes there."""
    if torch.device(device).type == "cpu":
        return HostLanes()
    return CudaLanes(device, num_bytes=device_memory)


def num_gpus() -> int:
    """GPUs that torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def default_device(local_rank: int) -> str:
    """The GPU of this process where there is one (ranks beyond their number share them), else the CPU."""
    return f"cuda:{local_rank % num_gpus()}" if num_gpus() else "cpu"
