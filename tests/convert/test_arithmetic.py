"""numpy and torch arithmetic agree bit for bit, and with torch itself, on every 16-bit pattern and on ties."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dist_export.convert.numpy_arithmetic import NumpyArithmetic  # noqa: E402
from dist_export.convert.torch_arithmetic import TorchArithmetic  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402
from dist_export.models.value_ops import ValueOp  # noqa: E402
from dist_export.plan.shard import PlannedTensor  # noqa: E402
from dist_export.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType  # noqa: E402
from dist_export.tensors.views import View  # noqa: E402

TYPES = (FLOAT32, FLOAT16, BFLOAT16)
ADD, SUBTRACT = ValueOp.ADD_ONE, ValueOp.SUBTRACT_ONE
OPS: list[tuple[ValueOp, ...]] = [(), (ADD,), (SUBTRACT,), (ADD, ADD)]
FUNCTIONS = {ADD: lambda t: t + 1, SUBTRACT: lambda t: t - 1}


def planned(source: DType, target: DType, ops: tuple[ValueOp, ...]) -> PlannedTensor:
    return PlannedTensor("w", target, View.zeros((1, 1)), source, ops)


def interesting_float32() -> np.ndarray:
    """Bits: random ones, denormals, every exponent, and exact ties of both 16-bit types, one bit beside too."""
    random = np.random.default_rng(0)
    bits = [random.integers(0, 1 << 32, 100_000, np.uint64), random.integers(0, 1 << 23, 5000, np.uint64)]
    high = random.integers(0, 1 << 16, 20_000, np.uint64) << np.uint64(16)
    bits += [high | np.uint64(low) for low in (0x8000, 0x7FFF, 0x8001)]  # halfway between two bfloat16
    high = random.integers(0, 1 << 19, 20_000, np.uint64) << np.uint64(13)
    bits += [high | np.uint64(low) for low in (0x1000, 0x0FFF, 0x1001)]  # halfway between two float16
    half_denormal = (random.random(20_000) * 2.0**-14).astype(np.float32).view(np.uint32)
    return np.concatenate([*(b.astype(np.uint32) for b in bits), half_denormal])


def patterns(dtype: DType) -> np.ndarray:
    """Raw finite values of an element type."""
    raw = interesting_float32() if dtype is FLOAT32 else np.arange(1 << 16, dtype=np.uint16)
    return raw[np.isfinite(as_torch(raw, dtype).float().numpy())]


def as_torch(raw: np.ndarray, dtype: DType) -> torch.Tensor:
    return torch.from_numpy(raw.view(f"i{dtype.itemsize}")).view(getattr(torch, dtype.name))


def torch_result(raw: np.ndarray, source: DType, target: DType, ops: tuple[ValueOp, ...]) -> torch.Tensor:
    values = as_torch(raw, source)
    for op in ops:
        values = FUNCTIONS[op](values)
    return values.to(getattr(torch, target.name))


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TYPES, TYPES)), ids=str)
@pytest.mark.parametrize("ops", OPS, ids=lambda ops: "+".join(op.value for op in ops) or "cast")
def test_numpy_and_torch_agree_with_torch(source: DType, target: DType, ops: tuple[ValueOp, ...]) -> None:
    raw = patterns(source)
    expected = torch_result(raw, source, target, ops)
    raw, expected = raw[torch.isfinite(expected).numpy()], expected[torch.isfinite(expected)]
    wanted = expected.view(torch.uint8).numpy().tobytes()
    assert len(raw) > 30_000
    for arithmetic in (NumpyArithmetic(), TorchArithmetic()):
        result = arithmetic.apply(planned(source, target, ops), raw.reshape(-1, 1))
        assert result.tobytes() == wanted, type(arithmetic).__name__


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TYPES, TYPES)), ids=str)
def test_what_is_not_finite_stays_so(source: DType, target: DType) -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0]).to(getattr(torch, source.name))
    raw = values.view(getattr(torch, f"int{8 * source.itemsize}")).numpy().view(f"u{source.itemsize}")
    results = []
    for arithmetic in (NumpyArithmetic(), TorchArithmetic()):
        data = np.frombuffer(arithmetic.apply(planned(source, target, ()), raw.reshape(2, 2)).tobytes(), np.uint8)
        results.append(torch.from_numpy(data.copy()).view(getattr(torch, target.name)).float())
    if target.itemsize == 2 and source is not target:
        assert results[0].numpy().tobytes() == results[1].numpy().tobytes()  # one NaN, whatever computes it
    for result in results:
        assert result[:2].tolist() == [float("inf"), -float("inf")]
        assert torch.isnan(result[2]) and result[3] == 1


@pytest.mark.parametrize("arithmetic", [NumpyArithmetic(), TorchArithmetic()], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("source", "target", "value", "message"),
    [
        (BFLOAT16, FLOAT16, 65536.0, r"w: 1 values do not fit float16 \(largest here 65536\)"),
        (FLOAT32, FLOAT16, -65520.0, r"w: 1 values do not fit float16 \(largest here 65520\)"),
        (FLOAT32, BFLOAT16, 3.4e38, r"w: 1 values do not fit bfloat16 \(largest here 3.4e\+38\)"),
    ],
)
def test_overflow_is_refused(arithmetic: Any, source: DType, target: DType, value: float, message: str) -> None:
    tensor = torch.tensor([[1.0, value]]).to(getattr(torch, source.name))
    raw = tensor.view(getattr(torch, f"int{8 * source.itemsize}")).numpy().view(f"u{source.itemsize}")
    with pytest.raises(ExportError, match=message):
        arithmetic.apply(planned(source, target, ()), raw)


@pytest.mark.parametrize("arithmetic", [NumpyArithmetic(), TorchArithmetic()], ids=["numpy", "torch"])
def test_the_largest_values_that_fit_are_kept(arithmetic: Any) -> None:
    raw = np.array([[65519.0, -65504.0]], np.float32).view(np.uint32)
    result = arithmetic.apply(planned(FLOAT32, FLOAT16, ()), raw)
    assert np.frombuffer(result.tobytes(), np.float16).tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("arithmetic", [NumpyArithmetic(), TorchArithmetic()], ids=["numpy", "torch"])
def test_blocks_that_are_not_contiguous(arithmetic: Any) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    block = whole[:, 1:4].view(np.uint32)
    result = arithmetic.apply(planned(FLOAT32, FLOAT16, (ADD,)), block)
    assert np.frombuffer(result.tobytes(), np.float16).tolist() == (whole[:, 1:4] + 1).reshape(-1).tolist()


def test_numpy_says_what_it_cannot_do() -> None:
    assert NumpyArithmetic.supports(planned(FLOAT32, BFLOAT16, (ADD,)))
    assert not NumpyArithmetic.supports(planned(FLOAT64, BFLOAT16, ()))
