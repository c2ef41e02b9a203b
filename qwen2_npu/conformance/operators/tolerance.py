"""Error bounds shared by several goldens, each derived from the operator's own order of roundings.

Notation: u is the unit roundoff of the dtype under test, u32 that of float32, and one correctly rounded
operation returns fl(a∘b) = (a∘b)(1+δ), |δ| <= u. A sum of n terms in any order accumulates at most n-1 such
factors per term; where all terms are positive that is a relative error of (n-1)·u to first order. Bounds hold
for any summation order, so they never need widening for a device that reduces in another one.
"""

from __future__ import annotations

import numpy as np

from qwen2_npu.conformance.operators.rounding import U32, FloatArray

SECOND_ORDER = 1.01
"""Factor on first-order bounds: their neglected products stay below one percent (every error is < 0.01)."""


def rstd_relative_error(width: int) -> float:
    """Relative error of 1/sqrt(mean(x²)+eps) in float32.

    Squares: 1 rounding; sum of ``width`` positive terms: width-1; division by width: 1; adding eps: 1 (both
    terms are positive, so errors do not grow): width+2, halved by the square root. Root and reciprocal: 2, or
    a device's rsqrt within 2 ulp (4 u32).
    """
    return ((width + 2) / 2 + 4) * U32 * SECOND_ORDER


def rms(x: FloatArray, epsilon: float) -> FloatArray:
    """1/sqrt(mean(x²)+eps) over the last axis, kept: (..., 1)."""
    return np.asarray(1.0 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + epsilon))
