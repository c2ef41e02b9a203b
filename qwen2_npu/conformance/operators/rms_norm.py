"""npu_rms_norm(input, gamma, epsilon=1e-6) -> (y, rstd): x·rstd·γ in float32 with one final rounding.

Shapes: input (..., H), gamma (H), y (..., H), rstd (..., 1) float32.

Tolerance. rstd carries ``rstd_relative_error``; the two products add 2 u32. y is therefore the rounding of a
value known to within r = rstd_relative_error + 2·u32: the bound is the distance from the rounded golden to
the rounding of either end of exact·(1±r), which for bfloat16 and float16 is zero except next to ties. That
tells this operator's single rounding from the two roundings of the eager model's norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample
from qwen2_npu.conformance.operators.rounding import FORMATS, U32, FloatArray, rounded_band
from qwen2_npu.conformance.operators.tolerance import rms, rstd_relative_error

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

DEFAULT_EPSILON = 1e-6


def rows(rng: np.random.Generator, shape: Sequence[int], magnitude: float, outlier: float = 0.0) -> FloatArray:
    """Normal rows of the given magnitude; ``outlier`` replaces one element per row, as real hidden states have."""
    made = rng.standard_normal(shape) * magnitude
    if outlier and made.size:
        made[..., shape[-1] // 2] = outlier
    return made


def build(
    rng: np.random.Generator,
    shape: Sequence[int],
    epsilon: float | None = None,
    magnitude: float = 1.0,
    outlier: float = 0.0,
    gamma: str = "normal",
) -> Arguments:
    weights = {
        "normal": rng.standard_normal(shape[-1]),
        "ones": np.ones(shape[-1]),
        "zeros": np.zeros(shape[-1]),
    }
    arguments = {"input": rows(rng, shape, magnitude, outlier), "gamma": weights[gamma]}
    return arguments if epsilon is None else arguments | {"epsilon": epsilon}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    x, gamma, epsilon = arguments["input"], arguments["gamma"], arguments.get("epsilon", DEFAULT_EPSILON)
    rstd = rms(x, epsilon)
    error = rstd_relative_error(x.shape[-1])
    exact = x * rstd * gamma
    # Products below float32's normal range lose up to `tiny` each (γ may scale the first one up).
    slack = np.abs(exact) * (error + 2 * U32) + FORMATS["float32"].tiny * (1 + np.abs(gamma))
    y, bound = rounded_band(exact, slack, dtype)
    return (
        Expected("y", y, bound),
        Expected("rstd", rstd, rstd * error, dtype="float32"),
    )


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    return st.fixed_dictionaries(
        {
            "shape": st.lists(st.integers(1, 5), min_size=1, max_size=3).flatmap(
                lambda lead: st.integers(1, 200).map(lambda width: [*lead, width])
            ),
            "epsilon": st.sampled_from([None, 1e-6, 1e-5, 1e-3]),
            "magnitude": st.sampled_from([1e-3, 0.03, 1.0, 40.0]),
            "outlier": st.sampled_from([0.0, 300.0]),
            "gamma": st.sampled_from(["normal", "ones", "zeros"]),
        }
    )


# Tiny rows have mean(x²) near epsilon: only there does a wrong epsilon show.
SHAPES_AND_SCALES: dict[str, dict[str, Any]] = {
    "regular": {"shape": [2, 7, 896]},
    "two_dimensional": {"shape": [5, 128]},
    "one_row": {"shape": [1, 1, 64]},
    "width_one": {"shape": [2, 3, 1]},
    "odd_width": {"shape": [3, 5, 193]},
    "four_dimensional": {"shape": [2, 3, 5, 64]},
    "no_rows": {"shape": [2, 0, 64]},
    "tiny_default_epsilon": {"shape": [2, 3, 64], "magnitude": 1e-3},
    "tiny_epsilon_1e-5": {"shape": [2, 3, 64], "magnitude": 1e-3, "epsilon": 1e-5},
    "tiny_epsilon_1e-6": {"shape": [2, 3, 64], "magnitude": 1e-3, "epsilon": 1e-6},
    "all_zero": {"shape": [1, 2, 64], "magnitude": 0.0},
    "large": {"shape": [2, 3, 128], "magnitude": 1e3},
    "outlier": {"shape": [2, 3, 320], "outlier": 2e3},
    "gamma_ones": {"shape": [2, 3, 128], "gamma": "ones"},
    "gamma_zeros": {"shape": [2, 3, 128], "gamma": "zeros"},
}

OPERATOR = OperatorRecord(
    name="npu_rms_norm",
    build=build,
    golden=golden,
    samples=Sample.numbered(SHAPES_AND_SCALES),
    strategy=strategy,
    invalid=(
        Invalid("gamma_too_short", {"gamma": lambda gamma: gamma[:-1]}, "gamma", {"shape": [2, 3, 64]}),
        Invalid("gamma_too_long", {"gamma": np.ones(65)}, "gamma", {"shape": [2, 3, 64]}),
        Invalid("gamma_of_one", {"gamma": np.ones(1)}, "gamma", {"shape": [2, 3, 64]}),
        Invalid("input_of_integers", {"input": np.ones((2, 3, 64), np.int32)}, "input", {"shape": [2, 3, 64]}),
    ),
)
