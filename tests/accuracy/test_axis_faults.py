"""Every fault of ``axis_faults`` is injected and seen by its case, and by none that was there before."""

from __future__ import annotations

import pytest

from qwen2_npu import Optimizations
from tests.accuracy import axes
from tests.accuracy.axis_faults import AXIS_FAULTS, AxisFault, rough_angles


def faulty(model: str, dtype: str, fault: AxisFault, device: str) -> object:
    ours = axes.pair_of(model, dtype, device).build(Optimizations.all())
    fault.patch(ours)
    return ours


@pytest.mark.parametrize("fault", AXIS_FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(fault: AxisFault, device: str) -> None:
    ours = faulty(fault.model, "float32", fault, device)
    failures = axes.compare(ours, fault.model, "float32", fault.batch, fault.way).failures()
    assert failures, f"{fault.description}: not noticed"


@pytest.mark.parametrize("fault", [fault for fault in AXIS_FAULTS if fault.hidden_from], ids=lambda fault: fault.name)
def test_fault_is_hidden_from_other_cases(fault: AxisFault, device: str) -> None:
    """So the axis is needed."""
    assert fault.hidden_from is not None
    model, batch, way = fault.hidden_from
    assert not axes.compare(faulty(model, "float32", fault, device), model, "float32", batch, way).failures()


def test_rough_angles_show_at_long_positions_alone(device: str) -> None:
    ours = axes.pair_of("long", "bfloat16", device).build(Optimizations.all())
    rough_angles(ours)
    _, second = axes.compare_long(ours, "long", "bfloat16")
    assert second.unexcused
    assert not second.paths[0].error.within
    short = axes.pair_of("eps_1e-5", "bfloat16", device).build(Optimizations.all())
    rough_angles(short)
    assert not axes.compare(short, "eps_1e-5", "bfloat16", "one", "steps").failures()
