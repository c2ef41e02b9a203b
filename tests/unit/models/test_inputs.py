"""Row compaction: any 2-D mask becomes a ragged batch aligned at slot 0, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2_npu.models.inputs import Rows

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
