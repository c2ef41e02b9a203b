"""What one pass is asked for, and its loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qwen2_npu.models.passes import Pass, shifted_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_computed_in_float32(dtype):
    """In the dtype of the logits a mean over many tokens has two or three digits."""
    logits = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(1))
    loss = shifted_loss(logits, labels, None)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten())
    assert abs(float(loss) - float(exact)) < 1e-5


def test_what_counts_are_labels_after_a_live_position():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels, live = torch.tensor([[9, 1, 2, 3], [9, -100, 4, 0]]), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    counted = [(0, 0, 1), (0, 1, 2), (1, 1, 4), (1, 2, 0)]  # row, position, label of the next one
    expected = [F.cross_entropy(logits[row, position], torch.tensor(label)) for row, position, label in counted]
    torch.testing.assert_close(shifted_loss(logits, labels, live), torch.stack(expected).mean())
    every = shifted_loss(logits, labels, None)
    torch.testing.assert_close(every, shifted_loss(logits, labels, torch.ones(2, 4)))
    assert every != shifted_loss(logits, labels, live)


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (1, 4), (3, 4)])
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf"labels of shape \({shape[0]}, {shape[1]}\) for logits of \(2, 4\): pass"):
        shifted_loss(torch.zeros(2, 4, 5), torch.zeros(shape, dtype=torch.int64), None)


@pytest.mark.parametrize("hidden", [(), (7,)], ids=["ids", "embeddings"])
@pytest.mark.parametrize(
    ("where", "past", "tokens", "looked_into"),
    [
        ("meta", 0, 1, True), ("meta", 0, 3, True), ("meta", 1, 2, True), ("meta", 5, 3, True),
        ("meta", 1, 1, False), ("meta", 5, 1, False), ("cpu", 5, 1, True),
    ],
)  # fmt: skip
def test_a_decode_step_on_a_card_is_all_that_is_not_looked_into(where, past, tokens, looked_into, hidden):
    """It must not wait for the device."""
    asked = Pass(torch.ones(2, tokens, *hidden, device=where), None, None, past, None, None)
    assert asked.looked_into is looked_into
    assert asked.total == past + tokens
