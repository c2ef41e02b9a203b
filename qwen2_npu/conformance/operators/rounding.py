"""Rounding to float32, bfloat16 and float16 in numpy float64, to nearest even, in one step.

Goldens compute in float64 and hold values of the narrow formats exactly; ``round_to`` is the only place where
a golden loses precision. Going through float32 on the way to bfloat16 would round twice, so nothing here
does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Format:
    """An IEEE-like binary format: ``precision`` significand bits (the hidden one included), normal exponent range."""

    precision: int
    min_exponent: int
    max_exponent: int

    @property
    def unit(self) -> float:
        """Unit roundoff u: |fl(x) - x| <= u·|x| for normal x."""
        return 2.0**-self.precision

    @property
    def tiny(self) -> float:
        """Half the smallest subnormal: |fl(x) - x| <= tiny for subnormal x."""
        return 2.0 ** (self.min_exponent - self.precision)

    @property
    def largest(self) -> float:
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.max_exponent


FORMATS = {
    "float32": Format(24, -126, 127),
    "bfloat16": Format(8, -126, 127),
    "float16": Format(11, -14, 15),
}
U32 = FORMATS["float32"].unit


def round_to(x: Array | float, dtype: str) -> FloatArray:
    """The values of ``x`` (any shape, float64) rounded to nearest even in ``dtype``; overflow gives an infinity."""
    form = FORMATS[dtype]
    wide = np.asarray(x, dtype=np.float64)
    exponent = np.frexp(wide)[1]  # wide = m·2^exponent with 0.5 <= |m| < 1
    quantum = np.maximum(exponent, form.min_exponent + 1) - form.precision
    with np.errstate(invalid="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(wide, -quantum)), quantum)
    rounded = np.where(np.isfinite(wide), rounded, wide)
    return np.where(np.abs(rounded) > form.largest, np.copysign(np.inf, rounded), rounded)


def rounded_band(exact: FloatArray, slack: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
    """(nearest, bound) for the one rounding of a value known only within ``exact ± slack``.

    Rounding is monotone, so the result lies between the roundings of both ends. The bound is zero wherever
    both ends round to the same number: away from ties the comparison is bit-exact.
    """
    nearest = round_to(exact, dtype)
    return nearest, np.maximum(round_to(exact + slack, dtype) - nearest, nearest - round_to(exact - slack, dtype))
