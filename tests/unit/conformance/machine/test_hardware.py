"""Hardware figures carry their provenance."""

from __future__ import annotations

from typing import get_args

from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE, Certainty, Figure


def test_every_figure_says_where_it_comes_from() -> None:
    assert DOCUMENTED_SOC in HARDWARE
    for soc, card in HARDWARE.items():
        assert card.soc == soc
        figures = [value for value in vars(card).values() if isinstance(value, Figure)]
        assert len(figures) >= 3
        for figure in figures:
            # A fit may find that something costs nothing; a bandwidth or a peak of nothing bounds nothing.
            assert figure.value > 0 or (figure.unit, figure.value, figure.certainty) == ("s", 0, "fitted")
            assert figure.unit in ("B/s", "FLOP/s", "s")
            assert figure.source
            assert figure.certainty in get_args(Certainty)


def test_the_documented_card_states_all_that_the_cost_model_takes() -> None:
    card = HARDWARE[DOCUMENTED_SOC]
    units = {name: value.unit for name, value in vars(card).items() if isinstance(value, Figure)}
    assert units == {
        "memory_bandwidth": "B/s",
        "bf16_peak": "FLOP/s",
        "int8_peak": "FLOP/s",
        "link_bandwidth": "B/s",
        "launch_overhead": "s",
        "host_overhead": "s",
        "collective_overhead": "s",
    }
