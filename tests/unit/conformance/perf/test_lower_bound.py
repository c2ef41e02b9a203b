"""The floor by hand, and every documented number above it."""

from __future__ import annotations

import pytest

from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf.documented import Documented, read
from qwen2_npu.conformance.perf.lower_bound import work
from qwen2_npu.conformance.sizes import SIZES

CARD = HARDWARE[DOCUMENTED_SOC]


def test_7b_decode_reads_its_weights() -> None:
    one = work(SIZES["7B"], "decode", batch=1, tokens=0)
    assert one.bytes == pytest.approx(14.14e9, rel=1e-3)
    assert one.floor_ms(CARD) == pytest.approx(17.7, rel=1e-2)  # 77 % of the documented 23 ms


def test_live_kv_is_read_once_per_row() -> None:
    one, more = (work(SIZES["7B"], "decode", batch=48, tokens=tokens) for tokens in (0, 1535))
    assert more.bytes - one.bytes == 48 * 1535 * 28 * 2 * 4 * 128 * 2


def test_7b_prefill_multiplies() -> None:
    prompt = work(SIZES["7B"], "prefill", batch=4, tokens=1024)
    products = 2 * 6.525e9 * 4096
    attention = 4 * 28 * 28 * 128 * 4 * 1024 * 1025 / 2
    assert prompt.operations == pytest.approx(products + attention, rel=1e-3)
    assert prompt.operations / 345e-3 == pytest.approx(157e12, rel=1e-2)  # what the documented latency implies


def test_cards_share_weights_and_kv() -> None:
    whole, shard = (work(SIZES["72B"], "decode", batch=4, tokens=1535, cards=cards) for cards in (1, 8))
    assert shard.bytes == pytest.approx(whole.bytes / 8, rel=1e-3)
    assert shard.floor_ms(CARD) / 38 == pytest.approx(0.6, abs=0.01)


def test_a_tied_head_reads_the_embedding_table() -> None:
    assert work(SIZES["0.5B"], "decode", 1, 0).bytes == pytest.approx(988e6, rel=1e-3)


@pytest.mark.parametrize("number", read(), ids=lambda number: number.row.id)
def test_no_documented_number_is_below_it(number: Documented) -> None:
    what, phase = number.row.configuration, number.row.phase
    tokens = 1024 if phase == "prefill" else 1024 + 1022 / 2
    floor = work(SIZES[what.model], phase, what.batch, tokens, what.cards).floor_ms(CARD)
    assert 0.1 * number.ms < floor < 0.8 * number.ms


def test_a_mixture_reads_and_multiplies_at_least_what_one_token_needs() -> None:
    size = SIZES["57B-A14B"]
    found = work(size, "decode", batch=1, tokens=0)
    kv = 2 * 28 * 4 * 128
    assert found.bytes == 2 * (size.activated - size.vocab * size.hidden + kv)
    assert work(size, "decode", batch=2, tokens=0).bytes == found.bytes + 2 * kv
