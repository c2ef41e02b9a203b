"""round_to against numpy's own formats and against bfloat16 done on float32's bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_npu.conformance.operators.rounding import FORMATS, round_to, rounded_band


def bfloat16_by_bits(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    return rounded.view(np.float32).astype(np.float64)


def interesting() -> np.ndarray:
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(20000) * 10.0 ** rng.uniform(-46, 39, 20000)
    edges = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        65504.0,
        65519.9,
        65520.0,
        6e-8,
        2.0**-25,
        2.0**-24,
        3.4e38,
        1e-45,
        np.inf,
        -np.inf,
    ]
    ties = 1 + (np.arange(64) + 0.5) * 2.0**-7
    return np.concatenate([spread, edges, ties, 1 + (np.arange(64) + 0.5) * 2.0**-10])


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("float32", np.float32), ("float16", np.float16)])
def test_agrees_with_numpy(dtype: str, numpy_dtype: type[np.floating]) -> None:
    with np.errstate(over="ignore"):
        expected = interesting().astype(numpy_dtype).astype(np.float64)
    np.testing.assert_array_equal(round_to(interesting(), dtype), expected)


def test_agrees_with_bfloat16_bits() -> None:
    with np.errstate(over="ignore"):
        x = interesting().astype(np.float32)
    x = x[np.isfinite(x)]
    np.testing.assert_array_equal(round_to(x, "bfloat16"), bfloat16_by_bits(x))


def test_bfloat16_rounds_once() -> None:
    """Just above a tie: through float32 it would land on the tie and go to even."""
    assert round_to(1 + 2.0**-8 + 2.0**-40, "bfloat16") == 1 + 2.0**-7


def test_passes_nan() -> None:
    assert np.isnan(round_to(np.nan, "float16"))


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.floats(-6e4, 6e4), st.sampled_from(list(FORMATS)))
def test_error_is_within_the_unit_roundoff(x: float, dtype: str) -> None:
    form = FORMATS[dtype]
    rounded = round_to(x, dtype)
    assert abs(float(rounded) - x) <= max(form.unit * abs(x), form.tiny)
    assert round_to(rounded, dtype) == rounded


def test_band_is_exact_away_from_ties_and_one_step_next_to_them() -> None:
    _, bound = rounded_band(np.array([1 + 2.0**-9, 1 + 2.0**-8]), np.array([1e-6, 1e-6]), "bfloat16")
    np.testing.assert_array_equal(bound, [0.0, 2.0**-7])
