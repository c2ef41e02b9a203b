"""Every fault that the suite exists for, injected, and seen to fail with a message that points at it."""

from __future__ import annotations

import re

import pytest

from qwen2_npu import Optimizations
from qwen2_npu.conformance.accuracy.configs import SHAPES
from qwen2_npu.conformance.operators import CATALOGUE
from qwen2_npu.conformance.operators.check import find_problems
from tests.accuracy.faults import FAULTS, Fault, Intercept
from tests.accuracy.pairs import pair_of

DEFAULT_WEIGHTS = "qwen2-0.5b"
WEIGHTS = [pytest.param(name, marks=() if name == DEFAULT_WEIGHTS else pytest.mark.slow) for name in SHAPES]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught_and_named(fault: Fault, weights: str, pytestconfig: pytest.Config) -> None:
    shape = SHAPES[weights]
    if fault.name == "gqa_modulo" and shape.heads == shape.kv_heads:
        pytest.skip("every query head has its own kv head: both mappings are the same")
    pair = pair_of(pytestconfig, weights, "float32")
    with fault.active():
        failure = pair.failure(Optimizations.up_to(fault.step), fault.batch, build=fault.building(pair.build))
    assert failure, f"{fault.description}: not noticed"
    assert failure.startswith(f"step {fault.step},"), failure
    assert re.search(fault.place, failure), f"{failure!r} does not match {fault.place!r}"


@pytest.mark.parametrize("operator", ["npu_rms_norm", "npu_add_rms_norm"])
def test_norm_epsilon_shows_at_operator_level_on_small_norms(operator: str, device: str) -> None:
    """In a model, activations are large against epsilon; the catalogue has inputs that are not."""
    fault = next(fault for fault in FAULTS if fault.name == "norm_epsilon")
    record = CATALOGUE[operator]
    with Intercept(fault.alter):
        problems = [
            find_problems(record, sample.parameters, "float32", device, sample.seed) for sample in record.samples
        ]
    assert any(problems), "no sample of the catalogue has a norm small enough to notice epsilon"
