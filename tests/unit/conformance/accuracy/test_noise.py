import math

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.accuracy.noise import (
    RMS_FACTOR,
    ErrorRatio,
    error_ratio,
    half_step,
    position_noise,
    rms,
    rounded,
)


def test_rms_of_known_values_and_of_none() -> None:
    assert rms(np.array([3.0, -4.0])) == pytest.approx(np.sqrt(12.5))
    assert rms(np.empty(0)) == 0.0


@pytest.mark.parametrize(
    ("optimised", "baseline", "floor", "within"),
    [
        (1.5, 1.0, 0.0, True),
        (math.nextafter(1.5, 2), 1.0, 0.0, False),
        (1.51, 1.0, 0.0, False),
        (1.51, 0.5, 1.1, True),  # the floor counts where the baseline is closer than the dtype lets anyone be
        (0.0, 0.0, 0.0, True),
        (1e-12, 0.0, 0.0, False),
        (float("nan"), 1.0, 0.0, False),
        (float("nan"), 0.0, 0.0, False),
        (float("inf"), 1.0, 0.0, False),
    ],
)
def test_bound(optimised: float, baseline: float, floor: float, within: bool) -> None:
    assert ErrorRatio(optimised, baseline, floor).within is within


def test_floor_is_one_rounding_of_the_reference() -> None:
    reference = np.array([1.0, 1.0 + 2.0**-9, 3.0])
    ratio = error_ratio(reference, reference, reference, torch.bfloat16)
    assert ratio.baseline == 0
    assert ratio.floor == pytest.approx(rms(np.array([0.0, 2.0**-9, 0.0])))
    np.testing.assert_array_equal(rounded(reference, torch.bfloat16), [1.0, 1.0, 3.0])


def test_floor_does_not_hide_an_error_of_the_dtype_below() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((64, 64))
    sloppy = rounded(reference, torch.bfloat16)
    assert error_ratio(sloppy, rounded(reference, torch.float32), reference, torch.float32).ratio > 1000 * RMS_FACTOR


def test_position_noise_is_the_largest_error_of_each_position() -> None:
    found = position_noise(np.array([[1.0, 2.0], [0.0, 0.5]]), np.zeros((2, 2)), torch.bfloat16)
    np.testing.assert_array_equal(found, [2.0, 0.5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_a_step_is_half_the_distance_to_the_next_number_of_the_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 8.3125, 15.9, 1024.0, 0.3, -1.0, -8.3125]).to(dtype)
    outward = torch.nextafter(values, values.sign() * 1e4)  # 1e4: float16 has no number far above it
    expected = (outward.double() - values.double()).abs() / 2
    np.testing.assert_array_equal(half_step(values.double().numpy(), dtype), expected.numpy())
    assert half_step(np.zeros(2), dtype).tolist() == [0.0, 0.0]


def test_noise_of_a_position_is_at_least_half_a_step_at_its_largest_logit() -> None:
    exact = np.array([[8.3125, 0.5, -1.0], [0.5, 1.0, -8.3125]])
    np.testing.assert_array_equal(position_noise(exact, exact, torch.bfloat16), [2.0**-5] * 2)
    for off, noise in ((2.0**-5 + 2.0**-40, 2.0**-5 + 2.0**-40), (2.0**-6, 2.0**-5)):
        stock = exact + np.array([off, 0.0, 0.0])
        np.testing.assert_array_equal(position_noise(stock, exact, torch.bfloat16)[0], noise)


def test_the_ratio_of_no_noise_is_none_infinite_or_nan() -> None:
    assert ErrorRatio(0.0, 0.0, 0.0).ratio == 0.0
    assert ErrorRatio(5e-324, 0.0, 0.0).ratio == float("inf")
    assert np.isnan(ErrorRatio(float("nan"), 0.0, 0.0).ratio)
    assert (ErrorRatio(3.0, 1.0, 2.0).noise, ErrorRatio(3.0, 2.0, 1.0).noise) == (2.0, 2.0)
    assert ErrorRatio(3.0, 1.0, 2.0).ratio == 1.5
