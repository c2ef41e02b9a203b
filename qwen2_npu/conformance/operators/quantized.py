"""What the goldens of 8-bit operators share: rows quantised to int8, and random int8 matrices."""

from __future__ import annotations

import numpy as np

from qwen2_npu.conformance.operators.record import Expected
from qwen2_npu.conformance.operators.rounding import U32, Array, FloatArray

LARGEST = 127.0
FLUSHED = 2.0**-126


def int8(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-127, 128, shape).astype(np.int8)


def rows(wide: FloatArray, slack: FloatArray) -> tuple[Expected, Expected]:
    """int8 rows and their float32 scales, of values known within ``slack``.

    scale = max|row| / 127 has the largest error of its row and two roundings. The quotient has that, its own error, and
    two roundings (a device may multiply by a reciprocal). It is exact in int8 but where a half lies within its error.
    A row of zeros gives zeros.
    """
    scale = np.abs(wide).max(-1, keepdims=True) / LARGEST
    scale_error = slack.max(-1, keepdims=True) / LARGEST + 2 * U32 * scale + FLUSHED
    divisor = np.where(scale == 0, 1.0, scale)
    ratio = wide / divisor
    error = np.where(scale == 0, 0.0, (slack + np.abs(ratio) * scale_error) / divisor + 3 * U32 * np.abs(ratio))
    whole = np.rint(ratio).clip(-128, 127)
    ends = [np.rint(ratio + sign * error).clip(-128, 127) for sign in (-1, 1)]
    return (
        Expected("y", whole, np.maximum(*(np.abs(end - whole) for end in ends)), dtype="int8"),
        Expected("scale", scale[..., 0], scale_error[..., 0], dtype="float32"),
    )
