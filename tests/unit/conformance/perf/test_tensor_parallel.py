"""The seam that tensor parallelism fills in: today it says what is missing, before and instead of building."""

from __future__ import annotations

import pytest

from qwen2_npu.conformance.perf import documented, tensor_parallel
from qwen2_npu.conformance.perf.job import Job
from qwen2_npu.errors import UnsupportedError

CONFIGURATIONS = {number.row.configuration for number in documented.read()}


def test_rows_on_several_cards_need_it_and_are_refused_alike() -> None:
    eight = [what for what in CONFIGURATIONS if what.cards > 1]
    assert {what.cards for what in eight} == {8}
    for what in eight:
        reason = tensor_parallel.why_not(what)
        assert reason == "needs tensor parallel: 72B runs on 8 cards"
        with pytest.raises(UnsupportedError, match=f"^{reason}$"):
            tensor_parallel.build(Job(what, "cpu", 8, 2), "cpu")


def test_rows_on_one_card_do_not() -> None:
    assert {tensor_parallel.why_not(what) for what in CONFIGURATIONS if what.cards == 1} == {None}
