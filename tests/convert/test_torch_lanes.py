"""The way through a device. There is no GPU here: a stand-in for torch's streams and events does everything at once,
on the CPU, and notes the order of what it is asked for; tests/gpu has the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

from dist_export.convert import torch_lanes  # noqa: E402
from dist_export.convert.torch_lanes import BLOCKS_IN_FLIGHT, CudaLanes, HostLanes  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402
from dist_export.tensors.dtypes import BFLOAT16, FLOAT32  # noqa: E402

Bytes = npt.NDArray[np.uint8]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for torch.cuda; lists what streams and events were asked for."""
    notes: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.name = ("there", "work", "back")[Stream.number % 3]
            Stream.number += 1

        number = 0

        def wait_event(self, event: Event) -> None:
            notes.append(f"{self.name} waits for {event.of}")

    class Event:
        def __init__(self, blocking: bool) -> None:
            self.of = ""

        def record(self, stream: Stream) -> None:
            self.of = stream.name

        def synchronize(self) -> None:
            notes.append(f"host waits for {self.of}")

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        yield

    cuda = SimpleNamespace(
        Stream=Stream,
        Event=Event,
        stream=stream,
        set_device=lambda device: None,
        OutOfMemoryError=torch.cuda.OutOfMemoryError,
        get_device_properties=lambda device: SimpleNamespace(total_memory=1 << 30),
        set_per_process_memory_fraction=lambda fraction, device: notes.append(f"fraction {fraction}"),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch_lanes, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    return notes


def double(values: torch.Tensor) -> Sequence[torch.Tensor]:
    return values * 2, values.sum()


def first(results: Sequence[Bytes]) -> Bytes:
    assert len(results) == 2 and results[1].nbytes == 4
    return results[0]


def blocks(*shapes: tuple[int, int]) -> list[npt.NDArray[np.uint32]]:
    return [
        np.arange(rows * columns, dtype=np.float32).reshape(rows, columns).view(np.uint32) + np.uint32(number)
        for number, (rows, columns) in enumerate(shapes)
    ]


def test_blocks_come_back_as_from_the_host(asked: list[str]) -> None:
    lanes, host = CudaLanes("cpu", num_bytes=1 << 29), HostLanes()
    sent = blocks((3, 5), (7, 2), (1, 1), (64, 9), (2, 2))  # growing and shrinking
    flight, found = [], []
    for block in sent:
        scratch = block.copy()
        flight.append(lanes.send(scratch, FLOAT32, double, first))
        scratch[...] = 0  # what was sent may be overwritten
        if len(flight) > BLOCKS_IN_FLIGHT:
            with flight.pop(0) as data:
                found.append(data.copy())
    for pending in flight:
        with pending as data:
            found.append(data.copy())
    for block, data in zip(sent, found, strict=True):
        with host.send(block, FLOAT32, double, first) as expected:
            assert data.tobytes() == expected.tobytes() == (block.view(np.float32) * 2).tobytes()
    assert asked[0] == "fraction 0.5"


def test_nothing_waits_but_for_a_result(asked: list[str]) -> None:
    lanes = CudaLanes("cpu", num_bytes=1 << 29)
    flight = [lanes.send(block, FLOAT32, double, first) for block in blocks((4, 4), (4, 4), (4, 4))]
    each = ["work waits for there", "back waits for work"]
    assert asked[1:] == 3 * each
    with flight[0]:
        assert asked[1:] == [*(3 * each), "host waits for back"]


def test_one_block_too_many_is_a_bug(asked: list[str]) -> None:
    lanes = CudaLanes("cpu", num_bytes=1 << 29)
    for block in blocks(*[(2, 2)] * (BLOCKS_IN_FLIGHT + 1)):
        lanes.send(block, FLOAT32, double, first)
    with pytest.raises(AssertionError, match="more blocks are under way"):
        lanes.send(blocks((2, 2))[0], FLOAT32, double, first)


def test_a_refused_result_gives_its_place_back(asked: list[str]) -> None:
    lanes = CudaLanes("cpu", num_bytes=1 << 29)

    def refuse(results: Sequence[Bytes]) -> Bytes:
        raise ExportError("no")

    for _ in range(2 * BLOCKS_IN_FLIGHT + 2):
        with pytest.raises(ExportError, match="no"), lanes.send(blocks((2, 2))[0], FLOAT32, double, refuse):
            pass


def test_too_little_device_memory_says_what_to_do(asked: list[str]) -> None:
    def full(values: torch.Tensor) -> Sequence[torch.Tensor]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ExportError, match="more than the 1024 bytes of --device-memory"):
        CudaLanes("cpu", num_bytes=1024).send(blocks((2, 2))[0], FLOAT32, full, first)


def test_blocks_with_gaps_and_halves(asked: list[str]) -> None:
    lanes = CudaLanes("cpu", num_bytes=1 << 29)
    whole = torch.randn(6, 10).bfloat16().view(torch.int16).numpy().view(np.uint16)
    part = whole[1:5, 2:9]

    def negate(values: torch.Tensor) -> Sequence[torch.Tensor]:
        assert values.dtype is torch.bfloat16 and values.shape == (4, 7)
        return (-values,)

    with lanes.send(part, BFLOAT16, negate, lambda results: results[0]) as data:
        assert data.tobytes() == (part ^ np.uint16(0x8000)).tobytes()
