"""Lengths of rows: one where all share it, and never more than the sequence has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qwen2_npu.ops.attention.lengths import all_known, as_column, check_lengths, longest


@pytest.mark.parametrize(
    ("given", "found"), [([9, 9, 9], [9]), ([9], [9]), ([9, 0, 9], [9, 0, 9]), ([0, 0, 0], [0]), ([9, 9, 8], [9, 9, 8])]
)
def test_one_length_stands_for_rows_that_share_it(given: list[int], found: list[int]) -> None:
    """A window that all rows have needs no mask."""
    assert check_lengths("npu_x", "lengths", given, 3, 9) == found
    assert longest(given) == max(given)
    column = as_column(given, torch.device("cpu"))
    assert column.tolist() == [[[[n]]] for n in given]
    assert not column.is_pinned()  # memory that only a copy to a GPU makes use of


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([10], "lengths from 0 to 9"), ([-1], "lengths from 0 to 9"), ([9, 9, 10], "lengths from 0 to 9"),
        ([-1, 9, 9], "lengths from 0 to 9"), ([], "1 or 3 entries"), ([1, 2], "1 or 3 entries"),
        ([1, 2, 3, 4], "1 or 3 entries"),
    ],
)  # fmt: skip
def test_lengths_that_no_row_can_have(given: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^npu::npu_x: lengths is \[.*\]; supported: {message}"):
        check_lengths("npu_x", "lengths", given, 3, 9)


def test_no_rows_have_no_lengths() -> None:
    assert check_lengths("npu_x", "lengths", [], 0, 9) == []


@pytest.mark.parametrize("symbol", [0, 1], ids=["first", "last"])
def test_a_graph_takes_lengths_that_were_symbols_beside_numbers(symbol: int) -> None:
    """Nothing asks for their values: the same graph serves another length, beyond the limit of the checks, too."""

    def column(x: Tensor) -> Tensor:
        lengths = [3, 3]
        lengths[symbol] = x.shape[0]
        assert not all_known(lengths)
        assert check_lengths("npu_x", "lengths", lengths, 2, 2) is lengths
        return as_column(lengths, x.device)

    graph = make_fx(column, tracing_mode="symbolic")(torch.zeros(5))
    for size in (5, 8):
        expected = [3, 3]
        expected[symbol] = size
        found = graph(torch.zeros(size))
        assert found.dtype == torch.int64
        assert found.tolist() == [[[[n]]] for n in expected]
