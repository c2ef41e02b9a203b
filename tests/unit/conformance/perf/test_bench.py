"""The documented number beside a measured one, what is refused before any work, and the order of the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf import bench
from qwen2_npu.conformance.perf.bench import BenchCase, BenchResult, Setup
from qwen2_npu.conformance.perf.builds import Weights
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.optimizations import QUANTIZED
from tests.unit.mixture import needs_mixtures

GUIDE = {"input_tokens": 1024, "steps": 1023, "dtype": torch.bfloat16, "transformers": "4.37.0"}


def result(monkeypatch: pytest.MonkeyPatch, model: str, case: BenchCase, mode: str, **changes: Any) -> BenchResult:
    """Of a measurement that took 100 ms + 50 ms per step."""
    how = GUIDE | changes
    monkeypatch.setattr(bench, "package_version", lambda name: how[name])
    contexts = (0, *range(how["input_tokens"], how["input_tokens"] + how["steps"]))
    measured = Measurement(100.0, (50.0,) * how["steps"], (), contexts, how["input_tokens"], how["steps"])
    setup = Setup(Weights.of(model), mode, "cpu", how["dtype"], how["input_tokens"], how["steps"] + 1)
    return bench._result(setup, case, measured, None)


def numbers(*arguments: Any, **changes: Any) -> tuple[float | None, float | None]:
    found = result(*arguments, **changes)
    return found.documented_prefill_ms, found.documented_decode_ms


def shares(model: str, step: str, dtype: torch.dtype, cards: int = 1) -> tuple[float | None, ...]:
    """Of the card's roofs, of a prefill of 100 ms and steps of 50 ms."""
    card = HARDWARE[DOCUMENTED_SOC]
    measured = Measurement(100.0, (50.0,) * 3, (), (0, 1024, 1025, 1026), 1024, 3)
    setup = Setup(Weights.of(model), "eager", "cpu", dtype, 1024, 4, cards)
    found = bench._result(setup, BenchCase(step, 4), measured, card)
    return found.decode_memory_share, found.prefill_compute_share, found.decode_compute_share


@pytest.mark.parametrize(("model", "cards"), [("7B", 1), ("72B", 8)])
def test_the_roofs_of_8_bit_weights_count_them_as_such(model: str, cards: int) -> None:
    card, size = HARDWARE[DOCUMENTED_SOC], SIZES[model].shard(cards)
    seconds = 50e-3 * card.memory_bandwidth.value
    for dtype, item in ((torch.bfloat16, 2), (torch.float32, 4)):
        plain = shares(model, "swiglu", dtype, cards)
        w8a16, w8a8 = (shares(model, scheme, dtype, cards) for scheme in QUANTIZED)
        assert None not in (*plain, *w8a16, *w8a8)
        saved = item * size.quantised - size.quantised - item * size.channels
        for found in (w8a16, w8a8):
            assert plain[0] - found[0] == pytest.approx(saved / seconds)  # type: ignore[operator]
        assert w8a16[1:] == plain[1:]  # multiplied in the dtype of the activations
        assert 0.5 * plain[1] < w8a8[1] < 0.7 * plain[1]  # type: ignore[operator]


def test_a_steps_batches_come_together_so_that_its_model_is_built_once():
    assert bench.cases(["original", "swiglu"], [1, 4]) == [
        BenchCase("original", 1), BenchCase("original", 4), BenchCase("swiglu", 1), BenchCase("swiglu", 4)
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [("original", "swiglu"), ("swiglu", "original")], ids="_".join)
def test_each_step_is_measured_with_its_own_model(steps: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[dict[str, Any]] = []
    built: list[str] = []

    def measure(model: str, **how: Any) -> Measurement:
        measured.append({"model": model, **how})
        return Measurement(100.0, (50.0,) * 3, (), (0, 6, 7, 8), 6, 3)

    monkeypatch.setattr(bench.protocol, "measure", measure)
    monkeypatch.setattr(bench, "build", lambda setup, step: built.append(step) or step)
    setup = Setup(TINY, "eager", "cpu", torch.float32, 6, 4)
    found = [(each.step, each.batch) for each in bench.run(setup, bench.cases(steps, [1, 4]), card=None)]
    assert built == list(steps)
    assert found == [(step, batch) for step in steps for batch in (1, 4)]
    how = {"input_tokens": 6, "decode_steps": 3, "weights": TINY.description}
    assert measured == [{"model": step, "batch": batch, **how} for step, batch in found]


def test_the_guides_number_is_that_of_the_same_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers(monkeypatch, "7B", BenchCase("fused_qkv", 4), "eager") == (366, 25)
    assert numbers(monkeypatch, "7B", BenchCase("fused_qkv", 4), "torchair") == (345, 24)
    assert numbers(monkeypatch, "7B", BenchCase("fused_qkv", 48), "torchair") == (3692, 45)
    assert numbers(monkeypatch, "7B", BenchCase("original", 4), "eager") == (575, 52)


def test_where_the_guide_has_no_row_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers(monkeypatch, "7B", BenchCase("swiglu", 4), "eager") == (None, None)
    assert numbers(monkeypatch, "7B", BenchCase("fused_qkv", 48), "eager") == (None, None)
    assert numbers(monkeypatch, "72B", BenchCase("fused_qkv", 4), "eager") == (None, None)  # eight cards there


def test_what_was_measured_otherwise_has_no_number_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = result(monkeypatch, "7B", BenchCase("original", 4), "eager", transformers="5.24.0")
    assert (stock.documented_prefill_ms, stock.documented_decode_ms) == (None, None)
    assert stock.not_documented[0] == (
        "the documented 575 ms are of the model of transformers 4.37.0, and 5.24.0 is installed"
    )
    ours = BenchCase("fused_qkv", 4)
    assert numbers(monkeypatch, "7B", ours, "eager", transformers="5.24.0") == (366, 25)
    assert numbers(monkeypatch, "7B", ours, "eager", steps=20) == (366, None)
    assert numbers(monkeypatch, "7B", ours, "eager", input_tokens=512) == (None, None)
    assert numbers(monkeypatch, "7B", ours, "eager", dtype=torch.float32) == (None, None)


# ---- refused before a model is built ---------------------------------------------------------------------------------
def check(weights: Weights, *todo: BenchCase, mode: str = "eager", device: str = "cpu", length: int = 16) -> None:
    bench.check(Setup(weights, mode, device, torch.bfloat16, length, 16), todo)


TINY = Weights.of_checkpoint(tiny.path())


def test_what_fits_is_accepted() -> None:
    for mode in ("eager", "inductor"):
        check(TINY, BenchCase("original", 1), BenchCase("swiglu", 4), mode=mode)
    check(TINY, BenchCase("swiglu", 1), length=2033)  # 2048 positions: the last of the new tokens takes none


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="2034 tokens and 16 new ones need 2049 positions, the model has max_position"):
        check(TINY, BenchCase("original", 1), length=2034)


@pytest.mark.parametrize("mode", ["torchair", "npugraph_ex"])
def test_a_mode_that_the_device_lacks_is_refused(mode: str) -> None:
    with pytest.raises(UnsupportedError, match=r"mode='(torchair|npugraph_ex)' (needs torch_npu|compiles for NPUs)"):
        check(TINY, BenchCase("swiglu", 1), mode=mode)


def test_inductor_is_refused_on_an_npu() -> None:
    with pytest.raises(UnsupportedError, match="mode='inductor' compiles for CPU and CUDA, and the device is npu"):
        bench.check_mode("inductor", torch.device("npu") if hasattr(torch, "npu") else NpuDevice(), "swiglu")


class NpuDevice:
    """What torch calls the device where torch_npu is installed."""

    type = "npu"

    def __str__(self) -> str:
        return "npu"


def test_what_cannot_fit_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 2 << 30)
    small = Weights.of("0.5B")
    check(small, BenchCase("original", 1), BenchCase("swiglu", 4))
    with pytest.raises(MemoryError, match=r"swiglu, batch 1, needs 2.88 GiB at the least, and 2 GiB are free on cpu"):
        check(Weights.of("1.5B"), BenchCase("swiglu", 1))
    # Scores of small operators: 14 heads · 8192² · (2 + 4) bytes. With fused attention there are none.
    check(small, BenchCase("swiglu", 1), length=8192)
    with pytest.raises(MemoryError, match=r"original, batch 1, needs 6.17 GiB"):
        check(small, BenchCase("swiglu", 1), BenchCase("original", 1), length=8192)


@needs_mixtures
def test_a_mixture_that_cannot_fit_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts are in memory, however few a step reads: 57.4 billion weights of two bytes."""
    monkeypatch.setattr(bench, "free_bytes", lambda device: 100 << 30)
    with pytest.raises(MemoryError, match=r"fused_moe, batch 1, needs 107 GiB at the least, and 100 GiB are free"):
        check(Weights.of("57B-A14B"), BenchCase("fused_moe", 1))


def test_a_device_says_what_is_free() -> None:
    assert 1 << 20 < bench.free_bytes("cpu") < 1 << 50  # type: ignore[operator]
    assert bench.free_bytes("meta") is None


def test_8_bit_weights_need_less_memory_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5B: 1.31 billion integers, and an embedding table of 0.23 billion elements of two bytes, which is the head."""
    monkeypatch.setattr(bench, "free_bytes", lambda device: 2 << 30)
    check(Weights.of("1.5B"), BenchCase("w8a16", 1), BenchCase("w8a8", 1))
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1 << 30)
    with pytest.raises(MemoryError, match=r"w8a16, batch 1, needs 1.66 GiB at the least"):
        check(Weights.of("1.5B"), BenchCase("w8a16", 1))


# ---- several cards --------------------------------------------------------------------------------------------------
def on_cards(cards: int, model: str = "72B") -> Setup:
    return Setup(Weights.of(model), "torchair", "npu", torch.bfloat16, 1024, 1024, cards)


def test_a_card_holds_its_part() -> None:
    case = BenchCase("fused_qkv", 4)
    whole, eighth = (bench.least_bytes(on_cards(cards), case) for cards in (1, 8))
    assert whole > 140e9
    assert eighth == pytest.approx(whole / 8, rel=0.01)


def test_ranks_that_cannot_share_the_model_are_refused() -> None:
    setup = Setup(Weights.of("0.5B"), "eager", "cpu", torch.bfloat16, 16, 16, 4)
    with pytest.raises(UnsupportedError, match="4 ranks do not divide 14; this model can be cut for 1, 2"):
        bench.check(setup, [BenchCase("swiglu", 1)])


def test_ranks_on_one_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BenchCase("swiglu", 1)
    setup = Setup(Weights.of("0.5B"), "eager", "cpu", torch.bfloat16, 16, 16, 2)
    monkeypatch.setattr(bench, "free_bytes", lambda device: bench.least_bytes(setup, case) * 2 - 1)
    with pytest.raises(MemoryError, match=r"swiglu, batch 1, needs .* GiB at the least"):
        bench.check(setup, [case])


def test_the_guides_number_is_that_of_as_many_cards() -> None:
    """72B on 8 cards is documented, on 4 it is not; the roofline is that of one card with its part."""
    card = HARDWARE[DOCUMENTED_SOC]
    measured = Measurement(1000.0, (50.0,) * 1023, (), (0, *range(1024, 2047)), 1024, 1023)
    four, eight = (bench._result(on_cards(n), BenchCase("fused_qkv", 4), measured, card) for n in (4, 8))
    assert (eight.cards, eight.documented_decode_ms is not None) == (8, True)
    assert four.documented_decode_ms is None
    assert four.decode_memory_share is not None
    assert eight.decode_memory_share == pytest.approx(four.decode_memory_share / 2, rel=0.02)
