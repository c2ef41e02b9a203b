"""The memory formula against what the NPU's own allocator counts, real or emulated; faults that hold memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen2_npu import cache
from qwen2_npu.compat import LOGITS_IN_FLOAT32
from qwen2_npu.conformance.perf import documented, memory
from qwen2_npu.conformance.perf.builds import Weights
from qwen2_npu.conformance.perf.memory import memory_of
from qwen2_npu.conformance.perf.protocol import measure
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.optimizations import LADDER, ORIGINAL, QUANTIZED

SMALL = Size("small", 256, 256, 2, 4, 2, 64, 512, tied=False)
SHAPES = {
    "attention": SMALL,
    "head_dim_128": replace(SMALL, head_dim=128),
    "mlp": replace(SMALL, intermediate=2048),
    "logits": replace(SMALL, vocab=16384),
    "no_groups": replace(SMALL, kv_heads=4, tied=True),
}
BATCH, TOKENS, STEPS = 3, 128, 3
ACCELERATOR = next((k for k in ("npu", "cuda") if hasattr(torch, k) and getattr(torch, k).is_available()), None)

needs_device = pytest.mark.skipif(ACCELERATOR is None, reason="no device here counts its memory")


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> None:
    """Models are collected between tests; what was there before need not be looked through every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _small_constants(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No slack, which would hide everything that small."""
    monkeypatch.setattr(memory, "SLACK", 0)
    yield
    gc.collect()


def peak_of(size: Size, step: str, fault: Any = None, **build: Any) -> int:
    assert ACCELERATOR is not None
    gc.collect()
    # What other tests of this process still hold on the device.
    held = getattr(torch, ACCELERATOR).memory_stats().get("requested_bytes.all.current", 0)
    model = Weights(size).build(Configuration("small", 1, BATCH, "eager", step), ACCELERATOR, **build)
    if fault is not None:
        fault(model)
    peak = measure(model, batch=BATCH, input_tokens=TOKENS, decode_steps=STEPS).peak_bytes
    assert peak is not None
    return peak - held


def formula(size: Size, step: str) -> memory.MemoryFormula:
    return memory_of(size, step, BATCH, TOKENS, STEPS, float32_logits=LOGITS_IN_FLOAT32)


def _cases() -> list[Any]:
    """Every step with one shape, every shape with the first and the last step; the rest of the product is slow."""
    found = []
    for shape in SHAPES:
        for step in ("fixed_kv_cache", "flash_attention", "add_rms_norm", "last_token_logits", "fused_qkv", "swiglu"):
            quick = shape == "attention" or step in ("fixed_kv_cache", "swiglu")
            found.append(pytest.param(step, shape, id=f"{step}-{shape}", marks=() if quick else pytest.mark.slow))
    return found


@needs_device
@pytest.mark.parametrize(("step", "shape"), _cases())
def test_measured_peak_is_the_formulas(step: str, shape: str) -> None:
    expected, peak = formula(SHAPES[shape], step), peak_of(SHAPES[shape], step)
    assert expected.fault(peak) is None
    if "flash_attention" in memory.steps_on(step):
        assert peak == pytest.approx(expected.total, rel=2e-3)


@needs_device
@pytest.mark.parametrize("shape", ["attention", pytest.param("mlp", marks=pytest.mark.slow), "logits"])
def test_measured_peaks_of_8_bit_weights_are_the_formulas(shape: str) -> None:
    """As far below it as with other weights, since prefill computes little of its last layer."""
    room = {}
    for step in (LADDER[-1], *QUANTIZED):
        expected, peak = formula(SHAPES[shape], step), peak_of(SHAPES[shape], step)
        assert expected.fault(peak) is None
        room[step] = expected.total - peak
    assert room["w8a16"] == room[LADDER[-1]]
    # What the norms hand on is int8, which the formula leaves aside, with a float32 scale.
    int8 = BATCH * TOKENS * SMALL.hidden
    assert room[LADDER[-1]] < room["w8a8"] <= room[LADDER[-1]] + int8


@pytest.mark.parametrize("cards", [1, 2])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_8_bit_weights_by_hand(scheme: str, cards: int) -> None:
    plain, found = (memory_of(SMALL, step, 1, 8, 8, cards=cards) for step in (LADDER[-1], scheme))
    part = SMALL.shard(cards)
    qkv, products = 2 * 64 * (4 + 2 * 2) // cards, 2 * 256 * (64 * (4 + 2 * 2 + 4) + 3 * 256) // cards
    scales = qkv + 2 * (2 * 256 // cards + 256 + 256)
    assert (part.quantised, part.channels) == (products, scales)
    assert found.weights == plain.weights - products + 2 * scales
    assert found.tables == plain.tables + 4 * (scales + qkv)  # the float32 copies of scales and biases
    assert found.cache == plain.cache


@needs_device
def test_the_stock_model_stays_within_the_small_operators_formula() -> None:
    assert formula(SMALL, ORIGINAL).fault(peak_of(SMALL, ORIGINAL)) is None


def _double_cache(model: Any) -> None:
    right = model.cache_shape
    model.cache_shape = lambda rows, tokens: right(rows, 2 * tokens + 128)


def _all_logits(model: Any) -> None:
    model._supports_logits_to_keep = lambda: False


def _second_copy_of_the_weights(model: Any) -> None:
    model.kept = [parameter.clone() for parameter in model.parameters()]


@needs_device
@pytest.mark.parametrize(
    ("fault", "shape"),
    [
        (_double_cache, "attention"),
        (_second_copy_of_the_weights, "mlp"),
        pytest.param(_all_logits, "logits", marks=pytest.mark.skipif(LOGITS_IN_FLOAT32, reason="a hook of 5.x")),
    ],
    ids=["cache_twice_as_long", "weights_twice", "logits_of_all_positions"],
)
def test_faults_that_hold_memory_are_seen(fault: Any, shape: str) -> None:
    message = formula(SHAPES[shape], "swiglu").fault(peak_of(SHAPES[shape], "swiglu", fault))
    assert message is not None
    assert "something holds memory that the formula does not know" in message


@needs_device
def test_float32_weights_are_seen() -> None:
    message = formula(SHAPES["mlp"], "swiglu").fault(peak_of(SHAPES["mlp"], "swiglu", dtype=torch.float32))
    assert message is not None


def test_too_little_memory_is_another_model() -> None:
    expected = formula(SMALL, "swiglu")
    assert "weights or cache are not what the row says" in str(expected.fault(expected.weights))


def test_every_documented_row_fits_its_card() -> None:
    for number in documented.read():
        what = number.row.configuration
        needs = memory_of(SIZES[what.model], what.step, what.batch, 1024, 1023, cards=what.cards)
        assert needs.total < 32 * 2**30, (number.row.id, needs)
    seven = memory_of(SIZES["7B"], "fused_qkv", 4, 1024, 1023)
    assert seven.weights == pytest.approx(15.23e9, rel=1e-3)
    assert seven.cache == 4 * 2048 * 28 * 2 * 4 * 128 * 2


def test_the_bucket_is_the_caches() -> None:
    assert memory.CAPACITY_BUCKET == cache.CAPACITY_BUCKET
    assert set(memory.steps_on(LADDER[-1])) == set(LADDER)


MEASURED = {
    "original": (94_535_168, 51_416_664),
    "fixed_kv_cache": (191_131_136, 191_402_792),
    "add_rms_norm": (191_393_280, 191_402_792),
    "last_token_logits": (31_354_368, 31_363_896),
    "swiglu": (30_830_080, 30_839_608),
}
"""Step -> the formula, and the peak of one of two emulated cards (torch_npu 2.13.0, transformers 5.24.0)."""


@pytest.mark.parametrize("step", MEASURED)
def test_a_part_of_a_model_needs_its_own_memory_and_the_logits_of_all(step: str) -> None:
    """The stock model of 5.x computes the last logits alone, which the formula leaves room for."""
    size = Size("small", 256, 512, 2, 8, 4, 32, 32768, tied=False)
    found, (total, peak) = memory_of(size, step, 2, 512, 4, cards=2), MEASURED[step]
    assert found.total == total
    assert found.fault(peak) is None
    assert step == ORIGINAL or peak == pytest.approx(total, rel=2e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_autotp_leaves_the_embedding_whole(tied: bool) -> None:
    size = replace(SMALL, tied=tied)
    vocabulary = size.vocab * size.hidden
    ours, stock = (memory_of(size, step, 1, 8, 8, cards=2).weights for step in ("fixed_kv_cache", ORIGINAL))
    assert ours == 2 * size.shard(2).parameters
    assert stock - ours == 2 * (vocabulary if tied else vocabulary // 2)
