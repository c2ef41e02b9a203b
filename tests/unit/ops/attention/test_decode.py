"""Windows of a decode step: which slots of the cache are read, and what it costs to keep rows apart."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

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


def test_rows_without_a_key_are_told_apart_in_a_graph_for_any_lengths() -> None:
    def rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        window = _left_window(9, [x.shape[0], y.shape[0], 1, 0], CPU)
        assert window.ragged is None  # from where it is depends on them
        assert window.rows is not None
        assert window.keep is not None
        return torch.cat([window.rows, window.keep], -1)

    graph = make_fx(rows, tracing_mode="symbolic")(torch.zeros(5), torch.zeros(4))
    for x, y in ((5, 4), (2, 3)):
        found = graph(torch.zeros(x), torch.zeros(y))[:, 0, 0].tolist()
        assert found == [[n > 0, *(slot < n for slot in range(max(x, y)))] for n in (x, y, 1, 0)]
