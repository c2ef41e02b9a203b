"""npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6) -> (y, rstd, x): residual add and norm, rounded as on a 910B.

Shapes: x1, x2, x, y (..., H); gamma (H); rstd (..., 1) float32.

    x = round(x1 + x2)          rstd = 1/sqrt(mean(x²)+eps), from the rounded x
    t = round(x·rstd)           y = round(t·γ)

Tolerance. x is exact: a float32 intermediate has more than 2p+2 bits for both narrow formats, so even
rounding twice gives the correctly rounded sum. x·rstd is known to within r = rstd_relative_error + u32 before
its rounding, so t is one of the roundings of exact·(1±r); y is the rounding of such a t times γ (in float32,
or in float16 itself: the product of two narrow numbers is exact in float32, so both give the same). The bound
is the distance to the ends of that interval: zero unless some t lies next to a tie. In float32 itself every
rounding is float32's and the same formula holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen2_npu.conformance.operators import rms_norm
from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample
from qwen2_npu.conformance.operators.rounding import FORMATS, U32, round_to
from qwen2_npu.conformance.operators.tolerance import rms, rstd_relative_error


def build(rng: np.random.Generator, shape: Sequence[int], **options: Any) -> Arguments:
    arguments = rms_norm.build(rng, shape, **options)
    x1 = arguments.pop("input")
    x2 = rms_norm.rows(rng, shape, options.get("magnitude", 1.0), -options.get("outlier", 0.0) / 2)
    return {"x1": x1, "x2": x2, **arguments}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    gamma, epsilon = arguments["gamma"], arguments.get("epsilon", rms_norm.DEFAULT_EPSILON)
    x = round_to(arguments["x1"] + arguments["x2"], dtype)
    rstd = rms(x, epsilon)
    error = rstd_relative_error(x.shape[-1])
    normal = x * rstd
    slack = np.abs(normal) * (error + U32) + FORMATS["float32"].tiny
    y = round_to(round_to(normal, dtype) * gamma, dtype)
    ends = [round_to(round_to(normal + sign * slack, dtype) * gamma, dtype) for sign in (-1, 1)]
    return (
        Expected("y", y, np.maximum(*(np.abs(end - y) for end in ends))),
        Expected("rstd", rstd, rstd * error, dtype="float32"),
        Expected("x", x, np.zeros_like(x)),
    )


OPERATOR = OperatorRecord(
    name="npu_add_rms_norm",
    build=build,
    golden=golden,
    samples=tuple(
        Sample(name, parameters, seed + 100)
        for seed, (name, parameters) in enumerate(rms_norm.SHAPES_AND_SCALES.items())
    ),
    strategy=rms_norm.strategy,
    invalid=(
        Invalid("gamma_too_short", {"gamma": lambda gamma: gamma[:-1]}, "gamma", {"shape": [2, 3, 64]}),
        Invalid("x2_of_other_shape", {"x2": lambda x2: x2[:, :1]}, "x2", {"shape": [2, 3, 64]}),
        Invalid("x2_of_other_dtype", {"x2": np.ones((2, 3, 64), np.int64)}, "x2", {"shape": [2, 3, 64]}),
    ),
)
