"""Checks of what callers pass, and which positions they keep."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.models import arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"foo": 1}, r"takes no argument foo$"),
        (
            {"num_logits_to_keep": 1, "cache_position": 2},
            r"no argument num_logits_to_keep; .*its name is logits_to_keep",
        ),
        ({"num_items_in_batch": 3}, r"num_items_in_batch: the loss is the mean"),
    ],
)
def test_an_argument_without_effect_is_refused(given, message):
    with pytest.raises(TypeError, match=message):
        arguments.check_names(given)


def test_what_generate_hands_to_every_model_is_taken():
    arguments.check_names({"cache_position": torch.arange(3), "tokenizer": object(), "is_first_iteration": True})
    arguments.check_names({"shift_labels": None})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"full_attention": None}, r"attention_mask is a dict: pass a 2-D mask .* = \(2, 5\)"),
        (torch.ones(2, 1, 2, 5), r"shape \(2, 1, 2, 5\): pass a 2-D mask"),
        (torch.ones(3, 5), r"shape \(3, 5\): pass a 2-D mask"),
        (torch.ones(2, 4), r"covers 4 tokens, but 3 are in the cache and 2 are new: pass"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        arguments.check_mask(mask, 2, 3, 2)


def test_masks_that_fit():
    arguments.check_mask(None, 2, 3, 2)
    arguments.check_mask(torch.zeros(2, 5), 2, 3, 2)


@pytest.mark.parametrize(
    ("total", "positions", "message"),
    [
        (9, None, r"9 tokens need as many positions, the model has max_position_embeddings=8: shorten"),
        (3, [[0, 8]], r"position_ids holds 8, the model has max_position_embeddings=8"),
        (3, [[-1, 0]], r"position_ids holds -1"),
    ],
)
def test_positions_without_a_row_in_the_table(total, positions, message):
    with pytest.raises(ValueError, match=message):
        arguments.check_positions(8, total, None if positions is None else torch.tensor(positions))


@pytest.mark.parametrize(
    ("keep", "positions"),
    [
        (0, [0, 1, 2, 3, 4]),
        (2, [3, 4]),
        (9, [0, 1, 2, 3, 4]),
        (torch.tensor([-1, 0]), [4, 0]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
        (torch.tensor(2), 2),
    ],
)
def test_kept_positions_are_those_that_the_stock_model_takes(keep, positions):
    kept = arguments.kept_positions(keep, 5)
    assert torch.arange(5)[slice(None) if kept is None else kept].tolist() == positions


def test_a_decode_step_keeps_its_one_position_without_an_index():
    assert arguments.kept_positions(1, 1) is None
