"""The way through a device. There is no GPU here: a stand-in for torch's streams and events does everything at once,
on the CPU, and notes the order of what it is asked for; tests/gpu has the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

from support.quantized import SCHEMES, export_here  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from dist_export.convert import choice, torch_lanes  # noqa: E402
from dist_export.convert.torch_lanes import BLOCKS_IN_FLIGHT, CudaLanes, HostLanes, Lanes, Work, as_torch  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402
from dist_export.quantization import QuantizationOptions  # noqa: E402
from dist_export.targets.huggingface.target import HuggingFaceOptions  # noqa: E402
from dist_export.targets.trtllm.target import TrtllmOptions  # noqa: E402
from dist_export.tensors.dtypes import BFLOAT16, FLOAT32, DType  # noqa: E402

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


def test_large_constants_go_through_pinned_memory(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of ordinary memory CUDA would wait for the work before them."""
    pinned: list[int] = []
    monkeypatch.setattr(
        torch_lanes, "_pinned", lambda size: pinned.append(size) or torch.empty(size, dtype=torch.uint8)
    )
    lanes = CudaLanes("cpu", num_bytes=1 << 29)
    few, many = np.arange(8, dtype=np.float32)[None], np.arange(1 << 15, dtype=np.float32).reshape(2, -1)
    for values in (few, many):
        assert torch.equal(lanes.constant(values), torch.from_numpy(values))
    assert pinned == [many.nbytes]


def test_a_gpu_that_does_not_start_says_what_to_do(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(device: torch.device) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nSearch for more")

    monkeypatch.setattr(torch.cuda, "Stream", busy)
    with pytest.raises(ExportError, match=r"cpu: CUDA does not start there .*unavailable\); see in nvidia-smi"):
        CudaLanes("cpu", num_bytes=1024)


Case = tuple[Callable[[pytest.FixtureRequest], Path], TrtllmOptions | HuggingFaceOptions, QuantizationOptions]


def calibrated(scheme: str) -> Callable[[pytest.FixtureRequest], Path]:
    return lambda request: request.getfixturevalue("quantized_checkpoints")[scheme]


def plain(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue("long_checkpoint")
    return folder


CASES: dict[str, Case] = {
    **{f"{each} trtllm": (calibrated(each), TrtllmOptions(), QuantizationOptions()) for each in SCHEMES},
    **{f"{each} hf": (calibrated(each), HuggingFaceOptions(), QuantizationOptions()) for each in SCHEMES},
    **{
        each: (plain, TrtllmOptions(), QuantizationOptions(algorithm=each))
        for each in ("fp8_per_channel", "int8_wo", "int4_wo")
    },
    **{each: (plain, TrtllmOptions(dtype=each), QuantizationOptions()) for each in ("bfloat16", "float16")},
}


@pytest.fixture(params=CASES)
def exported(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Lanes], dict[str, bytes]]:
    """Exports a case through the lanes it is given, with torch however small it is; its tensor files."""
    find, target, quantization = CASES[request.param]
    checkpoint = find(request)
    monkeypatch.setattr(choice, "MOST_BYTES", -1)

    def run(lanes: Lanes, **options: Any) -> dict[str, bytes]:
        monkeypatch.setattr(torch_lanes, "lanes_on", lambda device, *, device_memory: lanes)
        output = tmp_path / type(lanes).__name__
        export_here(checkpoint, output, target, quantization=quantization, device="cpu", **options)
        return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}

    return run


def test_an_export_through_the_lanes_is_that_of_the_host(
    exported: Callable[..., dict[str, bytes]], asked: list[str]
) -> None:
    on_host, in_flight = exported(HostLanes()), exported(CudaLanes("cpu", num_bytes=1 << 29), device_memory=64 << 20)
    assert on_host == in_flight != {}
    assert "host waits for back" in asked


class OfAGpu(TorchDispatchMode):
    """Refuses what a GPU would round in another way, or would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("mm", "bmm", "addmm", "_local_scalar_dense", "nonzero"), name
        if name in ("div", "div_"):  # by one number of the host it is a product with the reciprocal
            assert isinstance(args[1], torch.Tensor) and args[1].device.type == "meta", "divides by a number"
        return func(*args, **(kwargs or {}))


class MetaLanes(HostLanes):
    """Does the work on the meta device first: what it mixes with memory of the host, or asks for, is refused."""

    is_checking = False
    num_checked = 0

    def constant(self, values: npt.NDArray[Any]) -> torch.Tensor:
        there = super().constant(values)
        return there.to("meta") if self.is_checking else there

    def send(self, block: npt.NDArray[Any], dtype: DType, work: Work, finish: Any) -> Any:
        self.is_checking = True
        with OfAGpu():
            results = work(as_torch(np.ascontiguousarray(block), dtype).to("meta"))
        assert {result.device.type for result in results} == {"meta"}
        self.is_checking = False
        self.num_checked += 1
        return super().send(block, dtype, work, finish)


def test_nothing_on_the_device_needs_the_host(exported: Callable[..., dict[str, bytes]]) -> None:
    lanes = MetaLanes()
    assert exported(lanes, num_threads=1)
    assert lanes.num_checked > 4
