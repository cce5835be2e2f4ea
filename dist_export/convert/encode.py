"""Codes and scales of quantised weights, with torch: on a GPU where there is one, on the CPU otherwise.

Every quotient is an IEEE float32 division and every cast rounds to nearest, ties to even, so that CPU and CUDA give the
same bytes. Casts saturate: values are clamped first, since torch turned too large ones into NaN until 2.12.
Formulas: modelopt/torch/quantization/qtensor and modelopt/torch/export/quant_utils.py (`to_quantized_weight`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct, field

from dist_export.convert.numpy_arithmetic import from_float32, to_float32
from dist_export.convert.quality import Key, Qualities, Quality, sampled_rows
from dist_export.convert.scale_table import ScaleTable
from dist_export.convert.stored_codes import are_zeros, in_order, scales_of, weights_of
from dist_export.convert.torch_lanes import HostLanes, Lanes
from dist_export.convert.view_reader import ViewReader
from dist_export.errors import ExportError
from dist_export.models.value_ops import ValueOp
from dist_export.plan.quantize import FP8_MAX
from dist_export.plan.recipes import (
    Codes,
    Constant,
    Encoded,
    Factors,
    Folded,
    Scalars,
    ScaleForm,
    Smoothing,
    Stored,
    StoredScales,
    TableScales,
)
from dist_export.plan.shard import PlannedTensor
from dist_export.tensors.dtypes import INT64, UINT8, DType, dtype_by_name

Bytes = npt.NDArray[np.uint8]
Place = tuple[int, int, int, int]
"""First row, row end, first column, column end in the weight, taken as a matrix ``[rows, columns]``."""


class _Spread(Struct, frozen=True, kw_only=True):
    """Scales of a block, on the host: they spread over it on the device, where that costs nothing."""

    values: npt.NDArray[np.float32]
    """``[rows or 1, columns or 1]``, or ``[rows, blocks]``."""
    rows: npt.NDArray[np.int64] | None = None
    """Of every row of the block the row of `values`, where it is not the same one."""
    size: int = 1
    """Columns per scale where there are several, of which the block begins within the first."""
    skipped: int = 0
    """Columns of the first that lie before the block."""

    def on(self, lanes: Lanes, num_columns: int) -> torch.Tensor:
        """On the device: ``[rows or 1, columns or 1]``."""
        values = lanes.constant(self.values)
        if self.rows is not None:
            values = values.index_select(0, lanes.constant(self.rows))
        if self.size == 1:
            return values
        return values.repeat_interleave(self.size, -1)[:, self.skipped : self.skipped + num_columns]


class Encoder(Struct, frozen=True):
    """Carries out recipes. Any thread may use it."""

    table: ScaleTable
    reader: ViewReader
    lanes: Lanes = field(default_factory=HostLanes)
    qualities: Qualities = field(default_factory=Qualities)
    """What the codes are worth, filled as results are taken."""

    @property
    def in_flight(self) -> int:
        """How many blocks of a thread may be under way while it begins another."""
        return self.lanes.in_flight

    def begin(
        self, planned: PlannedTensor, block: npt.NDArray[Any], place: Place, *, key: Key
    ) -> AbstractContextManager[Bytes]:
        """The codes of a block of weights: `block` is ``[rows, columns]`` of raw source elements at `place`, and `key`
        the tensor in the run. This or entering the result raises `ExportError` for weights that are NaN or infinite.
        """
        recipe = planned.recipe
        assert isinstance(recipe, Encoded), f"{planned.name} has no codes"
        if recipe.codes.are_stored:
            return nullcontext(self._stored_codes(recipe, planned, np.ascontiguousarray(block).view(np.uint8), place))
        inverse = None if recipe.smoothing is None else self._inverse(recipe.smoothing, planned, place)
        scales = self._scales(recipe, planned, place)
        rows = None
        if recipe.codes in _DECODED:
            rows = sampled_rows(place[0], place[1], math.prod(planned.view.shape[:-1]))

        def work(weights: torch.Tensor) -> Sequence[torch.Tensor]:
            values, extremes = weights.float(), _extremes(weights)
            if inverse is not None:
                values = (values * inverse.on(self.lanes, weights.shape[1])).to(weights.dtype).float()
            spread = scales.on(self.lanes, weights.shape[1])
            if recipe.codes is Codes.WEIGHTS:
                return (values * spread).to(getattr(torch, planned.dtype.name)), extremes
            measured = _measured(recipe.codes, values, spread, rows) if rows else None
            codes = _ENCODERS[recipe.codes](values, spread)
            return (codes, extremes) if measured is None else (codes, extremes, measured)

        def finish(results: Sequence[Bytes]) -> Bytes:
            if not np.isfinite(results[1].view(np.float32)).all():
                kind = recipe.codes.value[0]
                raise ExportError(f"{planned.name}: holds NaN or infinite weights, which have no {kind} codes")
            if len(results) > 2:
                self.qualities.add(key, Quality.of(results[2].view(np.float64).tolist()))
            return results[0]

        return self.lanes.send(block, planned.source_dtype, work, finish)

    def _stored_codes(self, recipe: Encoded, planned: PlannedTensor, block: Bytes, place: Place) -> Bytes:
        """Codes that the checkpoint has, in order."""
        scales, (top, bottom, left, right) = recipe.scales, place
        if isinstance(scales, TableScales):
            return in_order(recipe.codes, block, np.zeros((1, 1), np.bool_), planned.name)
        assert isinstance(scales, StoredScales), f"{planned.name}: stored codes have stored scales"
        per_byte = 2 if planned.source_dtype == UINT8 else 1  # columns of the weight
        left, right, size = left * per_byte, right * per_byte, planned.view.shape[-1] * per_byte
        size //= scales.view.shape[-1]  # columns per scale
        first, end = left // size, -(-right // size)
        stored = self.reader.values(
            scales.view.narrow(-1 % len(scales.view.shape), first, end - first), scales.dtype, (top, bottom)
        )
        zeros, skipped = are_zeros(stored, scales.form), left - first * size

        def spread(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.repeat(values, size, axis=1)[:, skipped : skipped + right - left]

        if recipe.factors is not None:
            each = np.where(zeros, np.float32(0), scales_of(stored, scales.form, planned.name))
            weights = weights_of(recipe.codes, block, spread(each), self._factors(recipe.factors)[left:right])
            return np.ascontiguousarray(from_float32(weights, planned.dtype)).reshape(-1).view(np.uint8)
        if scales.form is ScaleForm.SCALE and scales.view.shape[-1] > 1 and (stored != stored[:, :1]).any():
            raise ExportError(
                f"{planned.name}: training ranks have scales of their own for the columns of a row, which has one "
                "place for a scale; export with a tp size that is a multiple of training's"
            )
        zeros = spread(zeros) if zeros.any() else zeros[:1, :1]
        return in_order(recipe.codes, block, zeros, planned.name)

    def small(self, planned: PlannedTensor, rows: tuple[int, int]) -> Bytes:
        """Bytes of some rows (of the tensor as a matrix) of what is no code: scales, factors, norms that take them."""
        recipe = planned.recipe
        if isinstance(recipe, Constant):
            if planned.dtype == INT64:
                return np.array(recipe.values, np.int64).view(np.uint8)
            values = np.array(recipe.values, np.float32)
        elif isinstance(recipe, Scalars):
            one = self.table.input_scale if recipe.of_inputs else self.table.weight_scale
            found = [max(one(group, recipe.divisor), np.float32(recipe.at_least)) for group in recipe.groups]
            values = np.array(found, np.float32)
            if recipe.reciprocal:
                values = np.float32(1) / values
        elif isinstance(recipe, Stored) and recipe.is_as_it_is and recipe.dtype == planned.dtype:
            return np.ascontiguousarray(self.reader.rows(recipe.view, recipe.dtype, rows)).reshape(-1).view(np.uint8)
        elif isinstance(recipe, Stored):
            values = self.reader.values(recipe.view, recipe.dtype, rows)
            if recipe.form is not None:
                values = scales_of(values, recipe.form, planned.name)
            if recipe.divisor is not None:
                values = _divided(values, recipe.divisor, planned.name)
            if recipe.times is not None:
                values = values * self._factors(recipe.times)[rows[0] : rows[1], None]
        else:
            assert isinstance(recipe, Folded), f"{planned.name} has codes"
            values = self._folded(planned, recipe)
        return np.ascontiguousarray(from_float32(values, planned.dtype)).reshape(-1).view(np.uint8)

    def _scales(self, recipe: Encoded, planned: PlannedTensor, place: Place) -> _Spread:
        top, bottom = place[:2]
        if isinstance(recipe.scales, TableScales):
            groups, divisor = recipe.scales.groups, recipe.scales.divisor
            num_rows = math.prod(planned.view.shape[:-1]) // len(groups)
            first, end = top // num_rows, -(-bottom // num_rows)
            each = [[self.table.weight_scale(group, divisor)] for group in groups[first:end]]
            rows = np.arange(top, bottom) // num_rows - first if len(each) > 1 else None
            return _Spread(values=np.array(each, np.float32), rows=rows)
        if isinstance(recipe.scales, Factors):
            return _Spread(values=self._factors(recipe.scales)[None, place[2] : place[3]])
        return self._stored(recipe.scales, planned, place)

    def _inverse(self, smoothing: Smoothing, planned: PlannedTensor, place: Place) -> _Spread:
        """The float32 reciprocals of the columns' scales, of every slice its own."""
        top, bottom, left, right = place
        view, num_rows = smoothing.view, planned.view.shape[-2]
        first, end = (top // num_rows, -(-bottom // num_rows)) if len(view.shape) > 1 else (0, 1)
        narrow = view.narrow(len(view.shape) - 1, left, right - left)
        scales = self.reader.values(narrow, smoothing.dtype, (first, end))
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise ExportError(f"{planned.name}: a smoothing scale is no number above zero; calibrate the model again")
        rows = np.arange(top, bottom) // num_rows - first if len(scales) > 1 else None
        return _Spread(values=np.float32(1) / scales, rows=rows)

    def _factors(self, factors: Factors) -> npt.NDArray[np.float32]:
        """``[channels]``."""
        values: npt.NDArray[np.float32] = self.reader.values(factors.view, factors.dtype).reshape(-1)
        return values

    def _stored(self, scales: StoredScales, planned: PlannedTensor, place: Place) -> _Spread:
        top, bottom, left, right = place
        blocks = scales.view.shape[-1]
        size = planned.view.shape[-1] // blocks  # columns per block
        narrow = scales.view.narrow(len(scales.view.shape) - 1, left // size, -(-right // size) - left // size)
        values = _divided(self.reader.values(narrow, scales.dtype, (top, bottom)), scales.divisor, planned.name)
        return _Spread(values=values) if blocks == 1 else _Spread(values=values, size=size, skipped=left % size)

    def _folded(self, planned: PlannedTensor, recipe: Folded) -> npt.NDArray[np.float32]:
        dtype = planned.source_dtype
        weight = self.reader.values(planned.view, dtype)
        for op in planned.values:
            weight = to_float32(from_float32(weight + _ADDED[op], dtype), dtype)
        weight = to_float32(from_float32(weight, planned.dtype), planned.dtype)
        factor = self.reader.values(recipe.factor, recipe.factor_dtype)
        if recipe.zero_centered:
            weight = weight + np.float32(1)
        product: npt.NDArray[np.float32] = np.multiply(weight, factor)
        if recipe.zero_centered:
            product -= np.float32(1)
        return product


_ADDED = {ValueOp.ADD_ONE: np.float32(1), ValueOp.SUBTRACT_ONE: np.float32(-1)}


def _divided(amax: npt.NDArray[np.float32], divisor: float, name: str) -> npt.NDArray[np.float32]:
    """amax / divisor; 1 where all weights are zero. `ExportError` for amax that is no number."""
    if not np.isfinite(amax).all() or (amax < 0).any():
        raise ExportError(f"{name}: a stored amax is NaN, infinite or negative; calibrate the model again")
    scales: npt.NDArray[np.float32] = np.where(amax > 0, amax / np.float32(divisor), np.float32(1)).astype(np.float32)
    return scales


def _fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _e4m3(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return _fp8(weights / scales)


def _int8(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (weights / scales).round().clamp(-128, 127).to(torch.int8)


def _int4(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Byte j of a column: row 2j in the low nibble, row 2j+1 in the high one."""
    codes = (weights / scales).round().clamp(-8, 7).to(torch.int8)
    return (codes[0::2] & 15) | (codes[1::2] << 4)


def _int4_words(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Column 8j + i of a row in bits 4i to 4i + 3 of word j, as code + 8."""
    codes = ((weights / scales).round().clamp(-8, 7) + 8).to(torch.uint8)
    eight = codes.view(torch.int64)  # one byte each; halves move together until all are in the lowest 32 bits
    eight = (eight | (eight >> 4)) & 0x00FF00FF00FF00FF
    eight = (eight | (eight >> 8)) & 0x0000FFFF0000FFFF
    return (eight | (eight >> 16)).to(torch.int32)


BLOCK = 16


def _block_scales(weights: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """E4M3 scales of blocks of 16 columns: amax / (6 x scale_2), within [2^-9, 448]; 1 for a block of zeros."""
    amax = torch.nn.functional.max_pool1d(weights.abs(), BLOCK)  # several times as fast as a reduction of a short dim
    scales = amax / (6.0 * scale_2)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales.clamp(2.0**-9, FP8_MAX).to(torch.float8_e4m3fn)


def _e2m1(weights: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Nearest of 0 .5 1 1.5 2 3 4 6, ties to the even code; sign in bit 3, never on zero magnitude from above."""
    scales = _block_scales(weights, scale_2).float() * scale_2
    values = (weights.reshape(weights.shape[0], -1, BLOCK) / scales.unsqueeze(-1)).reshape(weights.shape)
    pairs = _e2m1_codes(values).view(torch.int16)
    return ((pairs >> 4) | pairs).to(torch.uint8)


def _e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """One per byte: how many of the bounds between neighbours a magnitude has passed."""
    magnitude = values.abs()
    codes = (values < 0).view(torch.uint8) << 3
    for bound in (0.25, 1.25, 2.5, 5.0):
        codes += (magnitude > bound).view(torch.uint8)
    for bound in (0.75, 1.75, 3.5):  # a tie goes up to the even code
        codes += (magnitude >= bound).view(torch.uint8)
    return codes


def _e2m1_decoded(values: torch.Tensor) -> torch.Tensor:
    steps = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor([*steps, *(-step for step in steps)]).to(values.device, non_blocking=True)
    return table[_e2m1_codes(values).long()]


_ENCODERS = {
    Codes.E4M3: _e4m3,
    Codes.INT8: _int8,
    Codes.INT4: _int4,
    Codes.E2M1: _e2m1,
    Codes.E2M1_SCALES: _block_scales,
    Codes.INT4_WORDS: _int4_words,
}


_DECODED: dict[Codes, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {
    Codes.E4M3: (lambda values: _fp8(values).float(), 464.0),
    Codes.INT8: (lambda values: values.round().clamp(-128, 127), 127.5),
    Codes.INT4: (lambda values: values.round().clamp(-8, 7), 7.5),
    Codes.INT4_WORDS: (lambda values: values.round().clamp(-8, 7), 7.5),
    Codes.E2M1: (_e2m1_decoded, 7.0),
}
"""Quotients as their codes stand for them, and the magnitude from which on a larger code would be nearer."""


def _extremes(weights: torch.Tensor) -> torch.Tensor:
    """Smallest and largest as float32, NaN where one is; zeros of none."""
    return torch.stack(torch.aminmax(weights)).float() if weights.numel() else torch.zeros(2, device=weights.device)


def _measured(codes: Codes, weights: torch.Tensor, scales: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """What the codes of some rows are worth, as the fields of a `Quality` in float64."""
    if len(rows) < len(weights):
        chosen = torch.tensor(rows).to(weights.device, non_blocking=True)
        weights = weights.index_select(0, chosen)
        scales = scales if len(scales) == 1 else scales.index_select(0, chosen)
    smallest, largest = torch.aminmax(scales)
    if codes is Codes.E2M1:
        scales = (_block_scales(weights, scales).float() * scales).repeat_interleave(BLOCK, -1)
    decode, limit = _DECODED[codes]
    quotients = weights / scales
    signal, noise = weights.square().sum(), (decode(quotients) * scales - weights).square().sum()
    beyond = (quotients.abs() > limit).sum()
    num = torch.full((), float(weights.numel()), device=weights.device)
    return torch.stack([each.double() for each in (num, beyond, signal, noise, smallest, largest)])


def stored_dtype(codes: Codes) -> DType:
    """The element type of a file that holds codes; INT4 pairs are int8 for TensorRT-LLM."""
    names = {Codes.E4M3: "float8_e4m3fn", Codes.E2M1_SCALES: "float8_e4m3fn", Codes.E2M1: "uint8"}
    return dtype_by_name(names.get(codes, "int8"))
