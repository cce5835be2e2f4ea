"""Codes and scales of quantised weights, with torch: on a GPU where there is one, on the CPU otherwise.

Every quotient is an IEEE float32 division and every cast rounds to nearest, ties to even, so that CPU and CUDA give the
same bytes. Casts saturate: values are clamped first, since torch turned too large ones into NaN until 2.12.
Formulas: modelopt/torch/quantization/qtensor and modelopt/torch/export/quant_utils.py (`to_quantized_weight`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_export.convert.numpy_arithmetic import from_float32, to_float32
from dist_export.convert.scale_table import FP8_MAX, ScaleTable
from dist_export.convert.view_reader import ViewReader
from dist_export.errors import ExportError
from dist_export.models.value_ops import ValueOp
from dist_export.plan.recipes import Codes, Constant, Encoded, Folded, Scalars, Stored, StoredScales, TableScales
from dist_export.plan.shard import PlannedTensor
from dist_export.tensors.dtypes import DType, dtype_by_name

Bytes = npt.NDArray[np.uint8]
Place = tuple[int, int, int, int]
"""First row, row end, first column, column end in the weight, taken as a matrix ``[rows, columns]``."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Carries out recipes. Any thread may use it."""

    table: ScaleTable
    reader: ViewReader
    device: str = "cpu"

    def encode(self, planned: PlannedTensor, block: npt.NDArray[Any], place: Place) -> Bytes:
        """The codes of a block of weights: `block` is ``[rows, columns]`` of raw source elements at `place`.

        Raises `ExportError` for weights that are NaN or infinite.
        """
        recipe = planned.recipe
        assert isinstance(recipe, Encoded), f"{planned.name} has no codes"
        weights = _as_float32(block, planned.source_dtype, self.device)
        if not bool(torch.isfinite(weights).all()):
            kind = recipe.codes.value[0]
            raise ExportError(f"{planned.name}: holds NaN or infinite weights, which have no {kind} codes")
        scales = self._scales(recipe, planned, place)
        return _bytes_of(_ENCODERS[recipe.codes](weights, scales))

    def small(self, planned: PlannedTensor, rows: tuple[int, int]) -> Bytes:
        """Bytes of some rows (of the tensor as a matrix) of what is no code: scales, factors, norms that take them."""
        recipe = planned.recipe
        if isinstance(recipe, Constant):
            values = np.array(recipe.values, np.float32)
        elif isinstance(recipe, Scalars):
            one = self.table.input_scale if recipe.of_inputs else self.table.weight_scale
            found = [max(one(group, recipe.divisor), np.float32(recipe.at_least)) for group in recipe.groups]
            values = np.array(found, np.float32)
        elif isinstance(recipe, Stored) and recipe.divisor is None and recipe.dtype == planned.dtype:
            return np.ascontiguousarray(self.reader.rows(recipe.view, recipe.dtype, rows)).reshape(-1).view(np.uint8)
        elif isinstance(recipe, Stored):
            values = self.reader.values(recipe.view, recipe.dtype, rows)
            if recipe.divisor is not None:
                values = _divided(values, recipe.divisor, planned.name)
        else:
            assert isinstance(recipe, Folded), f"{planned.name} has codes"
            values = self._folded(planned, recipe)
        return np.ascontiguousarray(from_float32(values, planned.dtype)).reshape(-1).view(np.uint8)

    def _scales(self, recipe: Encoded, planned: PlannedTensor, place: Place) -> torch.Tensor:
        """Scales that spread over a block: ``[rows or 1, columns or 1]`` float32."""
        top, bottom = place[:2]
        if isinstance(recipe.scales, TableScales):
            groups, divisor = recipe.scales.groups, recipe.scales.divisor
            if len(groups) == 1:
                values = np.array([[self.table.weight_scale(groups[0], divisor)]], np.float32)
            else:
                num_rows = math.prod(planned.view.shape[:-1]) // len(groups)
                first, end = top // num_rows, -(-bottom // num_rows)
                each = [self.table.weight_scale(group, divisor) for group in groups[first:end]]
                values = np.array([[each[row // num_rows - first]] for row in range(top, bottom)], np.float32)
            return torch.from_numpy(values).to(self.device)
        values = self._stored(recipe.scales, planned, place)
        return torch.from_numpy(values).to(self.device)

    def _stored(self, scales: StoredScales, planned: PlannedTensor, place: Place) -> npt.NDArray[np.float32]:
        top, bottom, left, right = place
        blocks = scales.view.shape[-1]
        size = planned.view.shape[-1] // blocks  # columns per block
        narrow = scales.view.narrow(len(scales.view.shape) - 1, left // size, -(-right // size) - left // size)
        values = _divided(self.reader.values(narrow, scales.dtype, (top, bottom)), scales.divisor, planned.name)
        if blocks == 1:
            return values
        spread: npt.NDArray[np.float32] = np.repeat(values, size, axis=1)
        skipped = left - left // size * size
        return np.ascontiguousarray(spread[:, skipped : skipped + right - left])

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
    return np.where(amax > 0, amax / np.float32(divisor), np.float32(1)).astype(np.float32)


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


BLOCK = 16


def _block_scales(weights: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """E4M3 scales of blocks of 16 columns: amax / (6 x scale_2), within [2^-9, 448]; 1 for a block of zeros."""
    amax = weights.reshape(weights.shape[0], -1, BLOCK).abs().amax(-1)
    scales = amax / (6.0 * scale_2)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales.clamp(2.0**-9, FP8_MAX).to(torch.float8_e4m3fn)


def _e2m1(weights: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Nearest of 0 .5 1 1.5 2 3 4 6, ties to the even code; sign in bit 3, never on zero magnitude from above."""
    scales = _block_scales(weights, scale_2).float() * scale_2
    values = (weights.reshape(weights.shape[0], -1, BLOCK) / scales.unsqueeze(-1)).reshape(weights.shape)
    magnitude = values.abs()
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=weights.device)
    codes = torch.searchsorted(bounds, magnitude, out_int32=True).to(torch.uint8)
    for bound in (0.75, 1.75, 3.5):
        codes += (magnitude == bound).to(torch.uint8)
    codes += (values < 0).to(torch.uint8) << 3
    return (codes[..., 1::2] << 4) | codes[..., 0::2]


_ENCODERS = {
    Codes.E4M3: _e4m3,
    Codes.INT8: _int8,
    Codes.INT4: _int4,
    Codes.E2M1: _e2m1,
    Codes.E2M1_SCALES: _block_scales,
}


def _as_float32(block: npt.NDArray[Any], dtype: DType, device: str) -> torch.Tensor:
    contiguous = np.ascontiguousarray(block)
    signed = contiguous.view(f"i{dtype.itemsize}") if dtype.itemsize > 1 else contiguous
    return torch.from_numpy(signed).view(getattr(torch, dtype.name)).to(device).float()


def _bytes_of(codes: torch.Tensor) -> Bytes:
    flat = codes.contiguous().view(torch.uint8).cpu()
    result: Bytes = flat.numpy().reshape(-1)
    return result


def stored_dtype(codes: Codes) -> DType:
    """The element type of a file that holds codes; INT4 pairs are int8 for TensorRT-LLM."""
    names = {Codes.E4M3: "float8_e4m3fn", Codes.E2M1_SCALES: "float8_e4m3fn", Codes.E2M1: "uint8"}
    return dtype_by_name(names.get(codes, "int8"))
