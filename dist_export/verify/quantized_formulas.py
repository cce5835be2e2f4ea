"""Codes and scales by formulas of their own, with numpy: what a quantised export must hold, to the bit.

Written apart from `dist_export.convert.encode`, from the definitions of the formats: rounding is done on the bits of
float32 (E4M3, E2M1) or by `rint` (integers), and all quotients are float32 divisions.
Definitions: OCP Microscaling Formats 1.0 (E2M1), OCP 8-bit Floating Point 1.0 (E4M3); divisors and packing as
modelopt/torch/export/quant_utils.py has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dist_export.checkpoint.quantizer_scheme import Scheme

Float32 = npt.NDArray[np.float32]
Codes8 = npt.NDArray[np.uint8]
E4M3_MAX, E4M3_NAN = np.float32(448), 0x7F
FP4_COLUMNS = 16
"""Weights that share a scale of NVFP4."""


class Grain(Enum):
    """What a stored scale of weights belongs to."""

    MODULE = "the whole weight"
    ROW = "a row"
    BLOCK = "a block of columns"
    FP4 = "the whole weight, and every 16 columns"


class Form(Struct, frozen=True):
    """How the weights of a scheme are stored."""

    grain: Grain
    codes: Callable[[Float32], Codes8]
    """Quotients ``[rows, columns]`` -> one code each."""
    divisor: float
    """Amax over it is the scale."""
    second: float = 0.0
    """Divisor of the weight's second scale; 0: it has none."""
    inputs: float = 0.0
    """Divisor of the scale of activations; 0: it has none."""
    rows_per_byte: int = 1
    columns_per_byte: int = 1
    words: bool = False
    """Four-bit codes + 8, eight columns to a word of 32 bits, the first in the lowest bits."""
    level: int | None = None
    """Which of several quantisers that follow each other has the amax of `grain`."""


def e4m3(values: Float32) -> Codes8:
    """To nearest, ties to even, saturating at 448; NaN becomes NaN."""
    bits = values.view(np.uint32)
    sign = (bits >> 24).astype(np.uint8) & np.uint8(0x80)
    magnitude = np.minimum(np.abs(values), E4M3_MAX)
    small = np.rint(magnitude * np.float32(512)).astype(np.uint8)  # steps of 2^-9 below 2^-6
    inner = magnitude.view(np.uint32)
    rounded = (inner + np.uint32(0x7FFFF) + ((inner >> 20) & 1)) >> 20
    large = (rounded - np.uint32((127 - 7) << 3)).astype(np.uint8)
    code = np.where(magnitude < np.float32(2.0**-6), small, large) | sign
    result: Codes8 = np.where(np.isnan(values), np.uint8(E4M3_NAN), code).astype(np.uint8)
    return result


def e4m3_values(codes: Codes8) -> Float32:
    """What E4M3 codes stand for."""
    return _E4M3_VALUES[codes]


def _e4m3_table() -> Float32:
    table = np.zeros(256, np.float32)
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        value = (mantissa / 8 if exponent == 0 else 1 + mantissa / 8) * 2.0 ** (max(exponent, 1) - 7)
        table[code], table[code | 0x80] = value, -value
    table[0x7F] = table[0xFF] = np.nan
    return table


_E4M3_VALUES = _e4m3_table()


def int8(values: Float32) -> Codes8:
    """Two's complement, to nearest, ties to even, within -128 and 127."""
    return _bytes(np.clip(np.rint(values), -128, 127))


def int4(values: Float32) -> Codes8:
    """Two's complement in the low four bits, within -8 and 7."""
    return np.bitwise_and(_bytes(np.clip(np.rint(values), -8, 7)), 15, dtype=np.uint8)


def _bytes(numbers: Float32) -> Codes8:
    """Whole numbers as two's complement."""
    return numbers.astype(np.int16).astype(np.uint8)


def e2m1(values: Float32) -> Codes8:
    """The nearest of 0 0.5 1 1.5 2 3 4 6, ties to the even code, saturating; sign in bit 3."""
    magnitude = np.minimum(np.abs(values), np.float32(6))
    bits = magnitude.view(np.uint32)
    large = ((bits + np.uint32(0x1FFFFF) + ((bits >> 22) & 1)) >> 22) - np.uint32((127 - 1) << 1)
    small = np.rint(magnitude * np.float32(2))
    code = np.where(magnitude < 1, small, large).astype(np.uint8)
    result: Codes8 = code | ((values < 0).astype(np.uint8) << np.uint8(3))
    return result


def fp4_block_scales(weights: Float32, second: np.float32) -> Codes8:
    """E4M3 scales ``[rows, columns / 16]``: amax of each block over 6 times the weight's scale."""
    blocks = np.abs(weights.reshape(weights.shape[0], -1, FP4_COLUMNS)).max(-1)
    scales = blocks / (np.float32(6) * second)
    scales[scales == 0] = 1
    return e4m3(np.clip(scales, np.float32(2.0**-9), E4M3_MAX))


def packed_rows(codes: Codes8) -> Codes8:
    """Two rows of four-bit codes to a byte, the even row in the low bits."""
    result: Codes8 = codes[0::2] | (codes[1::2] << np.uint8(4))
    return result


def packed_columns(codes: Codes8) -> Codes8:
    """Two columns of four-bit codes to a byte, the even column in the low bits."""
    result: Codes8 = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return result


def packed_words(codes: Codes8) -> npt.NDArray[np.uint32]:
    """Eight columns of four-bit codes to a word, 8 added to each, the first column in the lowest bits."""
    digits = ((codes ^ 8) & 15).astype(np.uint32).reshape(codes.shape[0], -1, 8)
    words: npt.NDArray[np.uint32] = np.bitwise_or.reduce(digits << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    return words


def packed(codes: Codes8, form: Form) -> npt.NDArray[Any]:
    """Codes as stored."""
    if form.words:
        return packed_words(codes)
    if form.rows_per_byte == 2:
        return packed_rows(codes)
    return packed_columns(codes) if form.columns_per_byte == 2 else codes


def stored_scales(values: Float32, scheme: Scheme) -> Float32:
    """Scales of a weight that is stored as codes: INT4 keeps reciprocals; 1 for what is all zero."""
    nothing = no_scales(values, scheme)
    safe = np.where(nothing, np.float32(1), values).astype(np.float32)
    return np.float32(1) / safe if scheme in INT4 else safe


def no_scales(values: Float32, scheme: Scheme) -> npt.NDArray[np.bool_]:
    """Which of the stored numbers are of weights that are all zero."""
    found: npt.NDArray[np.bool_] = np.isinf(values) if scheme in INT4 else values == 0
    return found


def stored_int4(codes: Codes8) -> Codes8:
    """One two's complement per byte, of bytes that hold two columns, 8 added, the first in the high bits."""
    pairs = np.stack([codes >> np.uint8(4), codes & np.uint8(15)], axis=-1)
    result: Codes8 = (pairs.reshape(len(codes), -1) ^ np.uint8(8)) & np.uint8(15)
    return result


def single(value: Any) -> np.float32:
    """A number as float32."""
    result: np.float32 = np.float32(value)
    return result


def scale_of(amax: Float32, divisor: float) -> Float32:
    """amax / divisor; 1 for what is all zero."""
    result: Float32 = np.where(amax == 0, np.float32(1), amax / np.float32(divisor)).astype(np.float32)
    return result


INT4 = (Scheme.INT4_AWQ, Scheme.W4A8_AWQ)
_FP4 = Form(Grain.FP4, e2m1, 2688.0, second=2688.0, inputs=2688.0, columns_per_byte=2)
FORMS: Mapping[Scheme, Form] = {
    Scheme.FP8: Form(Grain.MODULE, e4m3, 448.0, inputs=448.0),
    Scheme.FP8_PER_CHANNEL_PER_TOKEN: Form(Grain.ROW, e4m3, 448.0),
    Scheme.INT8_SQ: Form(Grain.ROW, int8, 127.0, inputs=127.0),
    Scheme.INT4_AWQ: Form(Grain.BLOCK, int4, 7.0, rows_per_byte=2),
    Scheme.W4A8_AWQ: Form(Grain.BLOCK, int4, 7.0, second=448.0, inputs=448.0, rows_per_byte=2, level=0),
    Scheme.NVFP4: _FP4,
    Scheme.NVFP4_AWQ: _FP4,
    Scheme.W4A16_NVFP4: Form(Grain.FP4, e2m1, 2688.0, second=2688.0, columns_per_byte=2),
}
"""Schemes that can be recomputed."""
