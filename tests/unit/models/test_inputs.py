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
    assert torch.equal(moved.gather(1, compact.last(1, tokens, values.device)), values[:, -1:])


def test_no_mask_moves_nothing():
    rows = Rows.of(None, 2, 5)
    assert rows.order is None
    assert rows.last(2, 5, torch.device("cpu")).tolist() == [[3, 4], [3, 4]]


def test_only_the_new_columns_count():
    assert Rows.of(torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1]]), 2, 2).lengths == [2, 1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1], [0, 0]]), r"row 1 of the attention_mask has no live token"),
        (torch.ones(2, 1, 2, 2), r"shape \(2, 1, 2, 2\) does not cover .* pass a 2-D mask"),
        (torch.ones(3, 2), r"shape \(3, 2\) does not cover a batch of 2 rows"),
    ],
)
def test_masks_that_do_not_fit_raise(mask, message):
    with pytest.raises(ValueError, match=message):
        Rows.of(mask, 2, 2)
