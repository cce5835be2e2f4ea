"""Weights that a checkpoint stores as codes (``mtq.compress``): put in the order in which they are served.

Nothing is quantised anew: the same codes with the scales stored beside them.
Source: modelopt/torch/quantization/qtensor (`FP8QTensor`, `INT8QTensor`, `INT4QTensor`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_export.errors import ExportError
from dist_export.plan.recipes import Codes, ScaleForm

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def scales_of(stored: Float32, form: ScaleForm, name: str) -> Float32:
    """What codes are multiplied by; 1 for a row or block of zeros. `ExportError` for what no scale can be made of."""
    if np.isnan(stored).any() or (stored < 0).any() or (form is ScaleForm.SCALE and np.isinf(stored).any()):
        raise ExportError(f"{name}: a stored scale is NaN, infinite or negative; quantise the model again")
    if form is ScaleForm.RECIPROCAL and not stored.all():
        raise ExportError(f"{name}: a stored scale is 0, the reciprocal of infinity; quantise the model again")
    one = np.float32(1)
    with np.errstate(divide="ignore"):
        values = one / stored if form is ScaleForm.RECIPROCAL else stored
    scales: Float32 = np.where(are_zeros(stored, form), one, values).astype(np.float32)
    return scales


def are_zeros(stored: Float32, form: ScaleForm) -> npt.NDArray[np.bool_]:
    """Which rows or blocks had an amax of 0: their codes are quotients of zeros, and mean nothing."""
    found: npt.NDArray[np.bool_] = np.isinf(stored) if form is ScaleForm.RECIPROCAL else stored == 0
    return found


def in_order(codes: Codes, block: Bytes, zeros: npt.NDArray[np.bool_], name: str) -> Bytes:
    """What is written for stored codes ``[rows, columns]``, raw. `zeros` spreads over them as weights.

    Raises `ExportError` for FP8 codes that are NaN.
    """
    if codes is Codes.STORED_INT4:
        digits = _digits(block, zeros)
        return _flat((digits[0::2] & np.uint8(15)) | (digits[1::2] << np.uint8(4)))
    if codes is Codes.STORED_INT4_WORDS:
        return _flat(_words(_digits(block, zeros)))
    kept = np.where(zeros, np.uint8(0), block)
    if codes is Codes.STORED_E4M3 and ((kept & 0x7F) == 0x7F).any():
        raise ExportError(f"{name}: holds NaN codes; quantise the model again")
    return _flat(kept)


def weights_of(codes: Codes, block: Bytes, scales: Float32, factors: Float32) -> Float32:
    """The weights ``[rows, columns]`` that INT4 or INT8 codes stand for, each times the factor of its column.

    `scales` spreads over them as weights; of zeros the codes mean nothing, and stand for 0.
    """
    if codes is Codes.WEIGHTS_OF_INT4:
        numbers = (_digits(block, np.zeros((1, 1), np.bool_))).view(np.int8).astype(np.float32)
    else:
        numbers = block.view(np.int8).astype(np.float32)
    weights: Float32 = numbers * scales * factors
    return weights


def _digits(block: Bytes, zeros: npt.NDArray[np.bool_]) -> Bytes:
    """Two's complement, one column per byte, out of code + 8 with the even column in the high half."""
    digits = np.empty((block.shape[0], 2 * block.shape[1]), np.uint8)
    digits[:, 0::2], digits[:, 1::2] = (block >> 4) - np.uint8(8), (block & 15) - np.uint8(8)
    found: Bytes = np.where(zeros, np.uint8(0), digits)
    return found


def _words(digits: Bytes) -> npt.NDArray[np.uint32]:
    """Code + 8 of column 8j + i in bits 4i to 4i + 3 of word j."""
    shifted = ((digits + np.uint8(8)) & 15).reshape(len(digits), -1, 8)
    words = np.zeros(shifted.shape[:2], np.uint32)
    for number in range(8):
        words |= shifted[:, :, number].astype(np.uint32) << np.uint32(4 * number)
    return words


def _flat(values: npt.NDArray[np.uint8] | npt.NDArray[np.uint32]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
