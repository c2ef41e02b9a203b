"""npu_add_rms_norm_dynamic_quant(x1, x2, gamma) -> (y int8, nothing, x, scale, nothing): one scale per row.

    x = round(x1 + x2)          n = x · rstd · γ in float32, rstd from the rounded x          y, scale = rows of n

Tolerance. x is exact, as in npu_add_rms_norm. n has rstd's error and two roundings of float32; then ``quantized.rows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen2_npu.conformance.operators import add_rms_norm, quantized, rms_norm
from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample, Skip
from qwen2_npu.conformance.operators.rounding import U32, round_to
from qwen2_npu.conformance.operators.tolerance import rms, rstd_relative_error


def build(rng: np.random.Generator, shape: Sequence[int], explicit: bool = False, **options: Any) -> Arguments:
    made = add_rms_norm.build(rng, shape, **options)
    return made | {"output_mask": [True, False], "y_dtype": 1} if explicit else made


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    x = round_to(arguments["x1"] + arguments["x2"], dtype)
    wide = x * rms(x, arguments.get("epsilon", rms_norm.DEFAULT_EPSILON)) * arguments["gamma"]
    y, scale = quantized.rows(wide, np.abs(wide) * (rstd_relative_error(x.shape[-1]) + 2 * U32))
    nothing = np.zeros(0)
    return (
        y,
        Expected("y2", nothing, nothing, dtype="int8"),
        Expected("x", x, np.zeros_like(x)),
        scale,
        Expected("scale2", nothing, nothing, dtype="float32"),
    )


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"shape": [4, 896]},
    "three_dimensional": {"shape": [2, 3, 64]},
    "one_row": {"shape": [1, 3584]},
    "explicit": {"shape": [3, 64], "explicit": True},
    "tiny_epsilon_1e-5": {"shape": [3, 64], "magnitude": 1e-3, "epsilon": 1e-5},
}
_BASE: dict[str, Any] = {"shape": [3, 64]}

OPERATOR = OperatorRecord(
    name="npu_add_rms_norm_dynamic_quant",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=rms_norm.strategy,
    invalid=(
        Invalid("x1_of_integers", {"x1": np.ones((3, 64), np.int32)}, "x1", _BASE),
        Invalid("x2_of_other_shape", {"x2": lambda x: x[1:]}, "x2", _BASE),
        Invalid("gamma_too_short", {"gamma": lambda g: g[1:]}, "gamma", _BASE),
        Invalid("second_result_alone", {"output_mask": [False, True]}, "output_mask", _BASE),
        Invalid("both_results", {"output_mask": [True, True]}, "output_mask", _BASE),
        Invalid("int4", {"y_dtype": 16}, "y_dtype", _BASE),
        *(Invalid(name, {name: np.ones(64)}, name, _BASE) for name in ("smooth_scale1", "smooth_scale2", "beta")),
    ),
    skips=tuple(
        Skip("float32", "CANN's operator takes bfloat16 and float16", name, ("npu", "emulated"), ("float32",))
        for name in SAMPLES
    ),
)
