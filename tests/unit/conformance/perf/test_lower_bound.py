"""The floor by hand, and every documented number above it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf.documented import Documented, read
from qwen2_npu.conformance.perf.lower_bound import Work, kv_per_token, work
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.optimizations import LADDER, QUANTIZED

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
    # Of the last layer, all tokens but four need k and v alone: q and o_proj are 3584², the MLP 3 × 18944 × 3584.
    last = 2 * 4092 * (2 * 3584**2 + 3 * 18944 * 3584) + 4 * 28 * 128 * 4 * 1024 * 1023 / 2
    assert prompt.operations == pytest.approx(products + attention - last, rel=1e-3)
    assert (prompt.operations + last) / 345e-3 == pytest.approx(157e12, rel=1e-2)  # what the documented latency implies


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


def test_the_last_layer_of_a_mixture_s_prefill_is_that_of_one_token_per_row() -> None:
    size = SIZES["57B-A14B"]
    one, two = (work(size, "prefill", batch=1, tokens=tokens).operations for tokens in (1, 2))
    query, columns = 28 * 128, 20480 + 8 * 2560
    last = size.hidden * (2 * query + 3 * columns + 64 + 1)
    body = size.activated - 2 * size.vocab * size.hidden
    assert two - one == 2 * (body - last) + 4 * query * (27 * 2 + 1)


# ---- every part of the sum, on a size small enough for paper --------------------------------------------------------
SMALL = Size("small", hidden=8, intermediate=16, layers=3, heads=4, kv_heads=2, head_dim=2, vocab=50, tied=False)
QKV = (4 + 2 * 2) * 2
LAYER = 8 * QKV + QKV + 4 * 2 * 8 + 3 * 8 * 16 + 2 * 8
LAST = 8 * 4 * 2 + 4 * 2 * 8 + 3 * 8 * 16
HEAD = 50 * 8
BODY = 3 * LAYER + 8
KV = 2 * 3 * 2 * 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_decode_step_by_hand(batch: int, tokens: int, tied: bool) -> None:
    """The token itself is read and multiplied, too: one more than were in the cache."""
    found = work(replace(SMALL, tied=tied), "decode", batch, tokens)
    assert found.bytes == 2 * (BODY + HEAD + batch * (tokens + 1) * KV)
    assert found.operations == 2 * batch * (BODY + HEAD) + 4 * 3 * 4 * 2 * batch * (tokens + 1)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_prefill_by_hand(batch: int, tokens: int) -> None:
    """Logits of one token per row, and the causal half of the attention with its diagonal. Of the last layer k and v
    of all tokens, the rest of one token per row."""
    found = work(SMALL, "prefill", batch, tokens)
    assert found.bytes == 2 * (BODY + HEAD + batch * tokens * KV)
    pairs = batch * (2 * sum(range(1, tokens + 1)) + tokens)
    products = tokens * (BODY - LAST) + LAST + HEAD
    assert found.operations == 2 * batch * products + 4 * 4 * 2 * pairs


def test_cards_share_all_but_the_norms() -> None:
    one, two = (work(SMALL, "decode", 1, 7, cards) for cards in (1, 2))
    norms = 3 * 2 * 8 + 8
    assert two.bytes == (one.bytes - 2 * norms) / 2 + 2 * norms


@pytest.mark.parametrize(("bytes_", "operations", "floor"), [(10.0, 3.0, 5e3), (3.0, 10.0, 2e3), (4.0, 10.0, 2e3)])
def test_the_floor_is_the_longer_of_the_two(bytes_: float, operations: float, floor: float) -> None:
    figures = {"memory_bandwidth": 2.0, "bf16_peak": 5.0, "int8_peak": 10.0}
    card: Any = SimpleNamespace(**{name: SimpleNamespace(value=value) for name, value in figures.items()})
    assert Work(bytes_, operations).floor_ms(card) == floor
    # One unit makes both kinds of products, one after the other.
    assert Work(bytes_, operations - 2, 4).floor_ms(card) == floor


# ---- 8-bit weights --------------------------------------------------------------------------------------------------
ATTENTION = 8 * 8 + 2 * 8 * 4 + 8 * 8
"""Elements of q, k and v, and o of one layer."""
PRODUCTS = 3 * (ATTENTION + 3 * 8 * 16)
SCALES = 3 * (8 + 2 * 4 + 8 + 2 * 16 + 8)
"""One per row of q, k, v, o, gate, up and down."""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_decode_step_in_8_bits_by_hand(scheme: str, tied: bool) -> None:
    """One byte per quantised weight; two per scale, per element of head, norms and biases, and of the cache."""
    for item in (2, 4):
        found = work(replace(SMALL, tied=tied), "decode", 5, 7, step=scheme, item=item)
        assert found.bytes == PRODUCTS + item * (SCALES + BODY - PRODUCTS + HEAD + 5 * 8 * KV)
    operations = 2 * 5 * (BODY + HEAD) + 4 * 3 * 4 * 2 * 5 * 8
    integers = 2 * 5 * PRODUCTS if scheme == "w8a8" else 0
    assert (found.operations, found.integer_operations) == (operations - integers, integers)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_prefill_in_8_bits_by_hand(scheme: str) -> None:
    plain, found = work(SMALL, "prefill", 5, 7), work(SMALL, "prefill", 5, 7, step=scheme)
    assert found.bytes == PRODUCTS + 2 * (SCALES + BODY - PRODUCTS + HEAD + 5 * 7 * KV)
    assert found.operations + found.integer_operations == plain.operations
    assert found.integer_operations == (2 * 5 * (7 * (PRODUCTS - LAST) + LAST) if scheme == "w8a8" else 0)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_every_card_has_the_scales_of_o_and_down(scheme: str) -> None:
    one, two = (work(SMALL, "decode", 1, 7, cards, step=scheme) for cards in (1, 2))
    whole = 2 * (3 * 2 * 8 + 8) + 2 * 3 * 2 * 8  # norms; scales of o and down
    assert two.bytes == (one.bytes - whole) / 2 + whole
    assert two.integer_operations == one.integer_operations / 2


@pytest.mark.parametrize("size", ["0.5B", "7B", "72B-tp8"])
@pytest.mark.parametrize("step", [LADDER[-1], *QUANTIZED])
def test_a_lowered_graph_reads_these_weights_and_little_else(size: str, step: str) -> None:
    """Beside them the rows of the embedding table, and what operators take in float32 or twice."""
    known = SIZES[size]
    census = baselines.at_full_size(baselines.DocumentedGraph(size, "decode", 4, step))
    assert census is not None
    bound = work(known, "decode", 4, 0, step=step).bytes - 2 * 4 * kv_per_token(known)
    qkv = known.layers * (known.heads + 2 * known.kv_heads) * known.head_dim
    beside = 2 * 4 * known.hidden  # embedding
    if step in QUANTIZED:
        beside += 2 * qkv  # biases in float32
    if step == "w8a8":  # all scales in float32, those of gate and up once more
        beside += 2 * known.channels + 4 * 2 * known.layers * known.intermediate
    assert census.cost.weight_bytes == bound + beside
