"""Row compaction: any 2-D mask becomes a ragged batch aligned at slot 0, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import cache_of
from qwen2_npu.models.inputs import Rows
from tests.unit.small import small_config, small_stock, stock_weights

masks = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 9).flatmap(
        lambda tokens: st.lists(
            st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens).filter(any), min_size=batch, max_size=batch
        )
    )
)


@given(masks)
def test_live_tokens_come_first_in_their_order_and_go_back(rows):
    mask = torch.tensor(rows)
    batch, tokens = mask.shape
    values = torch.arange(batch * tokens).reshape(batch, tokens)
    compact = Rows.of(mask, batch, tokens)
    moved = compact.compact(values)
    assert compact.lengths == mask.sum(1).tolist()
    for row in range(batch):
        live = values[row][mask[row] == 1]
        assert torch.equal(moved[row, : len(live)], live)
    assert torch.equal(compact.restore(moved), values)
    for wanted in (slice(-1, None), torch.tensor([0, tokens // 2])):
        assert torch.equal(moved.gather(1, compact.find(wanted, tokens, values.device)), values[:, wanted])


def test_no_mask_moves_nothing():
    rows = Rows.of(None, 2, 5)
    assert rows.order is None
    assert rows.find(slice(-2, None), 5, torch.device("cpu")).tolist() == [[3, 4], [3, 4]]


def test_only_the_new_columns_count():
    assert Rows.of(torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1]]), 2, 2).lengths == [2, 1]


def test_a_row_without_a_live_token_raises():
    with pytest.raises(ValueError, match=r"row 1 of the attention_mask has no live token"):
        Rows.of(torch.tensor([[1, 1], [0, 0]]), 2, 2)


# ---- as many tokens as positions -----------------------------------------------------------------------------------
FEW = 27
"""Positions of the models below: no multiple of anything that capacities and prompts are rounded to."""


@pytest.fixture(scope="module")
def short_stock():
    return small_stock(small_config(num_hidden_layers=1, max_position_embeddings=FEW))


CASES = [(name, mode) for name in ("swiglu", "fixed_kv_cache") for mode in ("eager", "compiled")] + [("none", "eager")]
"""Step of the ladder, and whether steps go through what compile_model puts in place; no compiler is needed."""


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def short(request, short_stock):
    step, mode = request.param
    optimizations = Optimizations.none() if step == "none" else Optimizations.up_to(step)
    weights = stock_weights(short_stock)
    model = Qwen2ForCausalLM.from_state_dict(short_stock.config, weights, optimizations=optimizations)
    if mode == "compiled":
        model.compiled_steps = {"prefill": model.prefill_step, "decode": model.decode_step}
    return model


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def assert_close(ours, theirs, where=None):
    difference = (ours - theirs).abs()
    assert (difference if where is None else difference[where.bool()]).max() < 2e-4  # as in test_qwen2.py


def tokens(rows, width):
    return torch.randint(1, 199, (rows, width), generator=torch.Generator().manual_seed(width))


@torch.no_grad()
@pytest.mark.parametrize("width", [FEW - 1, FEW, FEW + 1])
def test_a_prompt_as_long_as_there_are_positions(short, short_stock, width):
    ids = tokens(2, width)
    if width <= FEW:
        assert_close(short(ids).logits, short_stock(ids).logits)
        assert_close(short(ids, use_cache=False).logits, short_stock(ids).logits)
        return
    with pytest.raises(
        ValueError, match=r"^28 tokens need as many positions, the model has max_position_embeddings=27"
    ):
        short(ids)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [FEW, FEW + 3, FEW + 11])
def test_padding_takes_no_position(short, short_stock, width, side):
    """Whoever counts the positions: this model, the caller as tokenizers do, or the caller with padding at any."""
    ids, mask = tokens(2, width), torch.ones(2, width, dtype=torch.int64)
    mask[0, : width - FEW] = 0
    mask[1, : width - 5] = 0
    mask = mask if side == "left" else mask.flip(1)
    theirs = short_stock(ids, attention_mask=mask, position_ids=positions(mask)).logits
    assert_close(short(ids, attention_mask=mask).logits, theirs, mask)
    counted = mask.cumsum(-1) - 1
    assert_close(short(ids, attention_mask=mask, position_ids=counted).logits, theirs, mask)
    assert_close(short(ids, attention_mask=mask, position_ids=counted + FEW * (1 - mask)).logits, theirs, mask)


@torch.no_grad()
def test_more_live_tokens_than_positions(short):
    ids, mask = tokens(2, FEW + 3), torch.ones(2, FEW + 3, dtype=torch.int64)
    mask[0, :2] = mask[1, :9] = 0
    with pytest.raises(ValueError, match=r"^28 tokens need as many positions"):
        short(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"^(28 tokens need as many positions|position_ids holds 27)"):
        short(ids, attention_mask=mask, position_ids=positions(mask))


@torch.no_grad()
@pytest.mark.parametrize("past", [FEW - 3, FEW - 1])
@pytest.mark.parametrize("new", [1, 2, 3, 4])
def test_a_continuation_up_to_the_last_position(short, short_stock, past, new):
    ids = tokens(2, past + new)
    first = short(ids[:, :past], use_cache=True)
    if past + new <= FEW:
        second = short(ids[:, past:], past_key_values=cache_of(first))
        assert_close(second.logits, short_stock(ids).logits[:, past:])
        return
    with pytest.raises(ValueError, match=rf"^{past + new} tokens need as many positions"):
        short(ids[:, past:], past_key_values=cache_of(first))
    assert cache_of(first).get_seq_length() == past
