"""Hardware figures carry their provenance."""

from __future__ import annotations

from qwen2_npu.conformance.hardware import DOCUMENTED_SOC, HARDWARE, Figure


def test_every_figure_says_where_it_comes_from() -> None:
    assert DOCUMENTED_SOC in HARDWARE
    for soc, card in HARDWARE.items():
        assert card.soc == soc
        figures = [value for value in vars(card).values() if isinstance(value, Figure)]
        assert len(figures) >= 2
        for figure in figures:
            assert figure.value > 0
            assert figure.source
            assert figure.certainty in ("datasheet", "reported", "inferred")
