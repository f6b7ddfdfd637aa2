"""Formats of a quantised base, one number after another in numpy: an oracle that shares no code with the package."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
F = np.float32

# The table of bitsandbytes' kDequant (csrc/kernels.cu), in the order of the codes.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    F,
)
NF4_BORDERS = (NF4[:-1] + NF4[1:]) / F(2)


def nf4_codes(values: Floats, block: int = 64) -> tuple[Codes, Floats]:
    """Codes (rows, width) of 0 to 15, and the scale of each block of each row."""
    rows, width = values.shape
    codes = np.zeros((rows, width), np.uint8)
    scales = np.zeros((rows, -(-width // block)), F)
    for row in range(rows):
        for number in range(scales.shape[1]):
            part = range(number * block, min((number + 1) * block, width))
            scale = np.abs(values[row, part]).max()
            scales[row, number] = 0 if scale < 2.0**-120 else scale
            for column in part:
                share = F(values[row, column] * F(F(1) / max(scale, F(1e-38))))
                codes[row, column] = np.count_nonzero(share > NF4_BORDERS)
    return codes, scales


def nf4_values(values: Floats, block: int = 64) -> Floats:
    """What nf4 makes of `values`."""
    codes, scales = nf4_codes(values, block)
    columns = np.arange(values.shape[1])
    return NF4[codes] * scales[:, columns // block]


def row_values(values: Floats, name: str) -> tuple[Floats, Floats]:
    """The levels (rows, width) of int8 or fp8 that `values` are rounded to, and the scale of each row."""
    largest = {"int8": 127, "fp8": 448}[name]
    levels = np.zeros(values.shape, F)
    scales = np.zeros(len(values), F)
    for row, numbers in enumerate(values):
        scales[row] = F(np.abs(numbers).max() / F(largest))
        for column, number in enumerate(numbers):
            share = F(0) if scales[row] == 0 else F(number / scales[row])
            share = F(min(max(share, -largest), largest))
            levels[row, column] = round(float(share)) if name == "int8" else _e4m3(float(share))
    return levels, scales


def _e4m3(value: float) -> float:
    """The nearest number with 3 bits of mantissa and an exponent of -6 to 8; of two the one with the even mantissa."""
    if value == 0:
        return 0.0
    exponent = max(int(np.floor(np.log2(abs(value)))), -6)
    step = 2.0 ** (exponent - 3)
    return round(value / step) * step
