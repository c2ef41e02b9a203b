from __future__ import annotations

import pytest

from qwen2_npu.emulator.collectives.faults import CollectiveFault, at, inject
from qwen2_npu.emulator.settings import EmulatorError


def test_parse() -> None:
    assert CollectiveFault.parse("hang:rank=1,collective=all_reduce,nth=3") == CollectiveFault(
        "hang", 1, "all_reduce", 3
    )
    assert CollectiveFault.parse("fail") == CollectiveFault("fail")


@pytest.mark.parametrize("text", ["", "slow", "fail:rank=one", "fail:card=1", "fail:rank"])
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(EmulatorError, match=r"unknown|is not a fault"):
        CollectiveFault.parse(text)


def test_strikes_where_it_is_asked_to() -> None:
    with inject("drop", rank=1, collective="all_reduce", nth=2):
        assert [at("all_reduce", 0), at("broadcast", 1), at("all_reduce", 1)] == [None, None, None]
        assert [at("all_reduce", 1), at("all_reduce", 1)] == ["drop", None]
    assert at("all_reduce", 1) is None


def test_strikes_everywhere_without_conditions() -> None:
    with inject("fail"):
        assert at("barrier", 3) == at("barrier", 3) == "fail"


def test_a_call_that_one_fault_strikes_is_counted_by_the_others() -> None:
    with inject("fail", nth=1), inject("drop", nth=2):
        assert [at("barrier", 0) for _ in range(3)] == ["fail", "drop", None]
