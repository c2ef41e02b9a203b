"""Windows of a decode step: which slots of the cache are read, and what it costs to keep rows apart."""

from __future__ import annotations

import torch

from qwen2_npu.ops.attention.decode import Window, _left_window

CPU = torch.device("cpu")


def test_one_length_for_all_rows_needs_no_mask() -> None:
    """With one, every step would copy the window to clear slots of which there are none."""
    assert _left_window(9, None, CPU) == Window(0, 9)
    assert _left_window(9, [5], CPU) == Window(0, 5)


def test_rows_of_several_lengths_share_the_longest_window() -> None:
    window = _left_window(9, [2, 5], CPU)
    assert (window.first, window.length, window.ragged, window.rows) == (0, 5, slice(2, None), None)
    assert window.keep is not None
    assert window.keep[:, 0, 0].tolist() == [[True, True, False, False, False], [True] * 5]
    empty = _left_window(9, [0, 3], CPU)
    assert empty.rows is not None
    assert empty.rows.flatten().tolist() == [False, True]
