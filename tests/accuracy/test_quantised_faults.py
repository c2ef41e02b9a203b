"""What can go wrong with 8-bit weights and activations, seen to fail with a message that points at it."""

from __future__ import annotations

import re

import pytest
import torch

from qwen2_npu import Optimizations
from qwen2_npu.optimizations import QUANTIZED
from tests.accuracy import quantised
from tests.accuracy.faults import Fault
from tests.accuracy.pairs import TINY
from tests.accuracy.quantised_faults import QUANTISED_FAULTS

FIRST = ("w8a16_scale_of_the_neighbour", "w8a8_scale_of_the_row_before")
"""Faults of the fast lane: one of weights, one of activations."""
LATER = (pytest.mark.slow, pytest.mark.slow_in_ci)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=() if fault.name in FIRST else LATER, id=fault.name) for fault in QUANTISED_FAULTS],
)
def test_fault_is_caught_and_named(fault: Fault, device: str) -> None:
    pair = quantised.pair_of(TINY, fault.step, "bfloat16", device)
    with fault.active():
        failure = pair.failure(Optimizations.up_to(fault.step), fault.batch, build=fault.building(pair.build))
    assert failure, f"{fault.description}: not noticed"
    assert failure.startswith(f"step {fault.step},"), failure
    assert re.search(fault.place, failure), f"{failure!r} does not match {fault.place!r}"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "layer by layer"])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_nothing_is_found_where_nothing_is_wrong(scheme: str, stream: bool, device: str) -> None:
    pair = quantised.pair_of(TINY, scheme, "bfloat16", device, stream)
    presets = quantised.PRESETS[scheme]
    for name in (f"up_to_{scheme}",) if stream else presets:
        assert pair.wrong_channel(pair.build(presets[name])) is None, name


def test_faults_are_well_formed() -> None:
    import qwen2_npu.ops  # noqa: F401 - defines torch.ops.npu

    assert len({fault.name for fault in QUANTISED_FAULTS}) == len(QUANTISED_FAULTS)
    for fault in QUANTISED_FAULTS:
        assert fault.step in QUANTIZED
        assert bool(fault.alter) != bool(fault.patch)
        assert all(hasattr(torch.ops.npu, name) for name in fault.alter)
