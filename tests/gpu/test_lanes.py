"""The way through a real GPU: what goes through it at once comes back as from a CPU, and nobody waits for it."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from dist_export.convert.encode import _DECODED, _ENCODERS, _measured  # noqa: E402
from dist_export.convert.torch_arithmetic import TorchArithmetic  # noqa: E402
from dist_export.convert.torch_lanes import BLOCKS_IN_FLIGHT, CudaLanes, HostLanes, Lanes  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402
from dist_export.models.value_ops import ValueOp  # noqa: E402
from dist_export.plan.recipes import Codes  # noqa: E402
from dist_export.plan.shard import PlannedTensor  # noqa: E402
from dist_export.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType  # noqa: E402
from dist_export.tensors.views import View  # noqa: E402

pytestmark = pytest.mark.gpu
Raw = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@pytest.fixture(scope="module")
def lanes() -> Iterator[CudaLanes]:
    yield CudaLanes("cuda:0", num_bytes=1 << 30)
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


def finite_patterns(dtype: DType) -> Raw:
    """Raw finite values: every 16-bit one; of float32 random ones, denormals, and ties of the 16-bit types."""
    if dtype is not FLOAT32:
        raw = np.arange(1 << 16, dtype=np.uint16)
        return raw[np.isfinite(tensor_of(raw, dtype).float().numpy())]
    random = np.random.default_rng(0)
    bits = [random.integers(0, 1 << 32, 1 << 20, np.uint64), random.integers(0, 1 << 23, 1 << 16, np.uint64)]
    for shift, half in ((16, 0x8000), (13, 0x1000)):
        high = random.integers(0, 1 << (32 - shift), 1 << 16, np.uint64) << np.uint64(shift)
        bits += [high | np.uint64(low) for low in (half, half - 1, half + 1)]
    words = np.concatenate(bits).astype(np.uint32)
    return words[np.isfinite(words.view(np.float32))]


def tensor_of(raw: Raw, dtype: DType) -> torch.Tensor:
    return torch.from_numpy(raw.view(f"i{dtype.itemsize}")).view(getattr(torch, dtype.name))


@pytest.mark.parametrize(("source", "target"), list(itertools.product((FLOAT32, FLOAT16, BFLOAT16), repeat=2)), ids=str)
@pytest.mark.parametrize("ops", [(), (ValueOp.ADD_ONE,)], ids=["cast", "plus one"])
def test_every_value_is_cast_alike(source: DType, target: DType, ops: tuple[ValueOp, ...], lanes: CudaLanes) -> None:
    planned = PlannedTensor("w", target, View.zeros((1, 1)), source, ops)
    raw = finite_patterns(source)
    values = tensor_of(raw, source) + 1 if ops else tensor_of(raw, source)
    raw = raw[torch.isfinite(values.to(getattr(torch, target.name))).numpy()].reshape(-1, 1)
    assert len(raw) > 30_000
    host, device = (TorchArithmetic(each).apply(planned, raw).tobytes() for each in (HostLanes(), lanes))
    assert host == device


SCALES = (1.0, 0.0123, 2.0**-9, 3.3e-5, 7.7e3, 1.5e-39)
"""Of them one below what float32 holds at full precision."""


@pytest.mark.parametrize("codes", _ENCODERS, ids=lambda codes: codes.name)
@pytest.mark.parametrize("source", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_every_value_gets_the_same_code(codes: Codes, source: DType) -> None:
    raw = finite_patterns(source)
    block = tensor_of(np.resize(raw, (-(-len(raw) // 4096) * 8, 512)), source)
    encode = _ENCODERS[codes]
    for scale in SCALES:
        spread = torch.full((1, 1), scale)
        host, device = encode(block.float(), spread), encode(block.cuda().float(), spread.cuda()).cpu()
        assert host.dtype == device.dtype and torch.equal(host.view(torch.uint8), device.view(torch.uint8)), scale


@pytest.mark.parametrize("codes", _DECODED, ids=lambda codes: codes.name)
def test_what_codes_are_worth_is_found_alike(codes: Codes) -> None:
    weights, scale = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), torch.full((1, 1), 0.02)
    rows = list(range(0, 64, 3))
    host = _measured(codes, weights, scale, rows)
    torch.testing.assert_close(_measured(codes, weights.cuda(), scale.cuda(), rows).cpu(), host, rtol=1e-4, atol=0)


def scaled(lanes: Lanes, factors: npt.NDArray[np.float32]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    def work(values: torch.Tensor) -> Sequence[torch.Tensor]:
        product = values.float() * lanes.constant(factors)
        return product.to(torch.float16), product.sum(dtype=torch.float64).reshape(1)

    return work


def joined(results: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    assert results[1].nbytes == 8
    return results[0]


def test_threads_with_blocks_of_any_size(lanes: CudaLanes) -> None:
    """A place that is used again too early, or a stream that does not wait, would mix them up."""
    host = HostLanes()

    def thread(seed: int) -> int:
        random, flight = np.random.default_rng(seed), deque()
        for number in range(60 + BLOCKS_IN_FLIGHT):
            if number < 60:
                rows, columns = (int(random.integers(1, 1 << random.integers(1, 12))) for _ in range(2))
                block = random.standard_normal((rows, columns), np.float32).view(np.uint32)
                factors = random.standard_normal((rows if seed % 2 else 1, columns), np.float32)  # some are large
                with host.send(block, FLOAT32, scaled(host, factors), joined) as data:
                    expected = data.tobytes()
                scratch = block.copy()
                flight.append((lanes.send(scratch, FLOAT32, scaled(lanes, factors), joined), expected))
                scratch[...] = 0
            if len(flight) > BLOCKS_IN_FLIGHT or number >= 60:
                pending, expected = flight.popleft()
                with pending as data:
                    assert data.tobytes() == expected, (seed, number)
        assert not flight
        return seed

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(thread, range(4))) == [0, 1, 2, 3]


def test_nobody_waits_while_blocks_are_sent(lanes: CudaLanes) -> None:
    """Not for the work before, with constants small and large; a copy there runs beside the work."""
    block = np.ones((1024, 2048), np.float32).view(np.uint32)
    factors = np.ones((1024, 2048), np.float32)
    inner = scaled(lanes, factors)

    def slow(values: torch.Tensor) -> Sequence[torch.Tensor]:
        torch.cuda._sleep(300_000_000)  # clock cycles, above 0.1 s
        return inner(values)

    for _ in range(2):  # the first time memory is pinned, which waits
        begun = time.monotonic()
        flight = [lanes.send(block, FLOAT32, slow, joined) for _ in range(BLOCKS_IN_FLIGHT + 1)]
        sent = time.monotonic() - begun
        for pending in flight:
            with pending as data:
                assert (data.view(np.float16) == 1).all()
        done = time.monotonic() - begun
    assert done > 0.3 and sent < done / 3, (sent, done)


def test_more_than_the_memory_is_refused() -> None:
    try:
        small = CudaLanes("cuda:0", num_bytes=24 << 20)
        with pytest.raises(ExportError, match="cuda:0: the conversion needs more than the 25165824 bytes of --device"):
            torch.cuda.empty_cache()
            small.send(np.zeros((4096, 4096), np.uint32), FLOAT32, lambda values: (values * 2,), joined)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
