"""Codes at the edges of their formats, against the definitions of the formats and against verify's own formulas."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from dist_export.convert.encode import _ENCODERS
from dist_export.plan.recipes import Codes
from dist_export.verify import quantized_formulas as formulas

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def encoded(codes: Codes, weights: object, scales: object = 1.0) -> np.ndarray:
    """Raw codes of float32 weights ``[rows, columns]``."""
    made = _ENCODERS[codes](torch.as_tensor(weights).float(), torch.as_tensor(scales).float().reshape(-1, 1))
    dtype = torch.int32 if codes is Codes.INT4_WORDS else torch.uint8
    return np.asarray(made.contiguous().view(dtype).numpy())


def test_scales_of_fp4_blocks() -> None:
    """1 for a block of zeros, as ModelOpt writes it; no scale below 2^-9, which E4M3 would make zero, or above 448."""
    second = np.float32(0.01)
    weights = np.zeros((6, 16), np.float32)
    weights[1, 5] = 6 * second * 2.0**-12
    weights[2, 15] = -6 * second * 2.0**-9
    weights[3, 0] = 6 * second * 448
    weights[4, 7] = -6 * second * 1000
    weights[5, 8] = 6 * second * 1.0625  # between 1 and 1.125: ties go to the even code
    found = encoded(Codes.E2M1_SCALES, weights, second)
    assert found.reshape(-1).tolist() == [0x38, 0x01, 0x01, 0x7E, 0x7E, 0x38]
    assert (found == formulas.fp4_block_scales(weights, second)).all()


def test_fp4_codes_at_the_middles() -> None:
    """A magnitude in the middle of two takes the even code; two columns to a byte, the even one low."""
    magnitudes = [*E2M1_VALUES, *MIDDLES, 6.0]
    row = np.array([sign * each for sign in (1, -1) for each in magnitudes], np.float32).reshape(1, -1)
    found = encoded(Codes.E2M1, row)
    codes = np.stack([found & 15, found >> 4], -1).reshape(-1)
    even = [0, 2, 2, 4, 4, 6, 6]
    expected = [*range(8), *even, 7]
    negative = [code | 8 if magnitude else 0 for code, magnitude in zip(expected, magnitudes, strict=True)]
    assert codes.tolist() == [*expected, *negative]
    assert (found == formulas.packed_columns(formulas.e2m1(row))).all()


@pytest.mark.parametrize(("codes", "lowest", "highest"), [(Codes.INT8, -128, 127), (Codes.INT4, -8, 7)])
def test_integers_to_the_nearest_and_no_further_than_they_reach(codes: Codes, lowest: int, highest: int) -> None:
    """A stored amax may be smaller than the weights. Ties go to the even number."""
    weights = [-1000.0, lowest - 0.6, lowest, lowest + 0.5, -2.5, -1.5, -0.5, -0.0]
    weights += [0.5, 1.5, 2.5, 3.49, highest - 0.5, highest, highest + 0.6, 1000.0]
    expected = [lowest, lowest, lowest, lowest, -2, -2, 0, 0, 0, 2, 2, 3, highest - 1, highest, highest, highest]
    found = encoded(codes, np.array(weights, np.float32).reshape(-1, 1))
    if codes is Codes.INT4:  # two rows to a byte, the even one low
        found = np.stack([found & 15, found >> 4], 1).reshape(-1, 1)
        found = np.where(found > 7, found.astype(np.int8) - 16, found).astype(np.int8)
    assert found.view(np.int8).reshape(-1).tolist() == expected


def test_e4m3_saturates() -> None:
    weights = np.array([[448.0, 449.0, 465.0, 1e30, -500.0, 2.0**-10, 1.5 * 2.0**-9, 17.0, 19.0]], np.float32)
    found = encoded(Codes.E4M3, weights)
    assert found.reshape(-1).tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x00, 0x02, 0x58, 0x5A]
    assert (found == formulas.e4m3(weights)).all()
