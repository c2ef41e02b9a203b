"""Lengths of rows: one where all share it, and never more than the sequence has."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.ops.attention.lengths import as_column, check_lengths, longest


@pytest.mark.parametrize(
    ("given", "found"), [([9, 9, 9], [9]), ([9], [9]), ([9, 0, 9], [9, 0, 9]), ([0, 0, 0], [0]), ([9, 9, 8], [9, 9, 8])]
)
def test_one_length_stands_for_rows_that_share_it(given: list[int], found: list[int]) -> None:
    """A window that all rows have needs no mask."""
    assert check_lengths("npu_x", "lengths", given, 3, 9) == found
    assert longest(given) == max(given)
    assert as_column(given, torch.device("cpu")).tolist() == [[[[n]]] for n in given]


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
