"""8-bit weights as numbers: the bits of compressed-tensors, and what rounding leaves of a weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_npu.checkpoint.packing import dequantise, integers_of, pack, scales_of, unpack, words
from tests.unit.checkpoint.quantised_folders import packed_by_hand

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

quickly = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def integers(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)


# ---- packing ---------------------------------------------------------------------------------------------------------
def test_bits_by_hand() -> None:
    """Plus 128, the first in the lowest byte; what fills a word up is zero bits, not the code of zero."""
    packed = pack(torch.tensor([[-128, -1, 0, 127, 5]], dtype=torch.int8))
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[0x7F00 + (128 << 16) + (255 << 24) - 2**32, 133]]


@quickly
@given(st.integers(1, 6), st.integers(1, 19), st.integers(0, 99))
def test_round_trip(rows: int, columns: int, seed: int) -> None:
    weight = integers(rows, columns, seed)
    packed = pack(weight)
    assert packed.shape == (rows, words(columns))
    assert torch.equal(packed, packed_by_hand(weight))
    assert torch.equal(unpack(packed, columns), weight)


@quickly
@given(st.integers(1, 19), st.data())
def test_any_columns_of_packed_rows(columns: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, columns - 1))
    stop = data.draw(st.integers(start + 1, columns))
    weight = integers(3, columns, 0)
    part = pack(weight)[:, start // 4 : words(stop)]
    assert torch.equal(unpack(part, stop - start, start % 4), weight[:, start:stop])


@quickly
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99))
def test_bits_of_the_package(rows: int, columns: int, seed: int) -> None:
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = integers(rows, columns, seed)
    packed = pack(weight)
    assert torch.equal(packed, package.pack_to_int32(weight, 8))
    assert torch.equal(package.unpack_from_int32(packed, 8, weight.shape), weight)


def test_views_are_packed_as_they_are_read() -> None:
    weight = integers(8, 12, 0)
    assert torch.equal(pack(weight.t()), packed_by_hand(weight.t().contiguous()))
    assert torch.equal(pack(weight[2:5, 1:6]), packed_by_hand(weight[2:5, 1:6]))


# ---- quantising ------------------------------------------------------------------------------------------------------
@quickly
@given(st.sampled_from(DTYPES), st.integers(1, 5), st.integers(1, 33), st.integers(-6, 3), st.integers(0, 99))
def test_half_a_step_at_most(dtype: torch.dtype, rows: int, columns: int, magnitude: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 2.0**magnitude).to(dtype)
    scale = scales_of(weight)
    found = integers_of(weight, scale)
    assert scale.shape == (rows, 1)
    assert scale.dtype == dtype
    assert found.dtype == torch.int8
    assert int(found.abs().max()) <= 127
    assert bool(((found.double() * scale.double() - weight.double()).abs() <= scale.double() * 0.5001).all())
    assert bool((found.abs().amax(dim=1) >= 126).all()), "every row uses the whole range"


def test_the_scale_is_rounded_before_the_integers_follow() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator).to(torch.bfloat16)
    exact = weight.double().abs().amax(dim=1, keepdim=True) / 127
    scale = scales_of(weight)
    assert torch.equal(scale, exact.to(torch.bfloat16))
    found = integers_of(weight, scale).double()
    assert torch.equal(found, (weight.double() / scale.double()).round().clamp(-127, 127))
    assert not torch.equal(found, (weight.double() / exact).round()), "they would be others with the scale unrounded"


def test_halves_go_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert scales_of(weight).item() == 1.0
    assert integers_of(weight, scales_of(weight)).tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, -0.0], [1.0, 2.0]], dtype=dtype)
    scale = scales_of(weight)
    assert scale[0].item() == torch.finfo(dtype).eps
    assert integers_of(weight, scale).tolist() == [[0, 0], [64, 127]]


def test_numbers_close_to_the_smallest_keep_their_sign() -> None:
    """There float16 has few scales: 1.4 of the smallest becomes 1, and more than 127 steps are asked for."""
    smallest = torch.finfo(torch.float16).smallest_normal / 1024
    weight = torch.tensor([[127 * 1.4 * smallest, -127 * 1.4 * smallest, 10 * smallest]]).to(torch.float16)
    assert scales_of(weight).item() == smallest
    assert integers_of(weight, scales_of(weight)).tolist() == [[127, -127, 10]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_scale_for_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    scale = scales_of(torch.tensor([[1.0, 2.0], [3.0, value]], dtype=dtype))
    assert torch.isfinite(scale).flatten().tolist() == [True, False]


@quickly
@given(st.sampled_from(DTYPES), st.integers(0, 99))
def test_dequantised_numbers_are_rounded_once(dtype: torch.dtype, seed: int) -> None:
    weight = integers(5, 9, seed)
    scale = (torch.rand(5, 1, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)
    found = dequantise(weight, scale, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, (weight.double() * scale.double()).to(dtype))
