"""Every fault that the suite exists for, injected, and seen to fail with a message that points at it."""

from __future__ import annotations

import re

import pytest
import transformers

from qwen2_npu import Optimizations
from qwen2_npu.conformance.accuracy.configs import SHAPES
from qwen2_npu.conformance.accuracy.locate_error import Explanation
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.operators import CATALOGUE
from qwen2_npu.conformance.operators.check import find_problems
from tests.accuracy.expert_faults import EXPERT_FAULTS
from tests.accuracy.faults import FAULTS, Fault, Intercept
from tests.accuracy.pairs import MIXTURE, pair_of

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


# ---- a mixture of experts -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mixture(pytestconfig: pytest.Config) -> ModelPair:
    if MIXTURE not in SHAPES:
        pytest.skip(f"transformers {transformers.__version__} has no Qwen2Moe")
    return ModelPair.of_shape(MIXTURE, device=pytestconfig.option.device, decode_steps=1)


@pytest.mark.parametrize("fault", EXPERT_FAULTS, ids=lambda fault: fault.name)
def test_fault_of_experts_is_caught_and_named(fault: Fault, mixture: ModelPair) -> None:
    model = fault.building(mixture.build)(Optimizations.up_to(fault.step))
    with fault.active():
        comparison, _ = mixture.compare(model, fault.batch)
        found = mixture.locate(model, fault.batch)
    explanation = Explanation(fault.step, (), found, tuple(comparison.failures()))
    assert re.search(fault.place, str(explanation)), f"{str(explanation)!r} does not match {fault.place!r}"


@pytest.mark.slow
@pytest.mark.parametrize("fault", EXPERT_FAULTS, ids=lambda fault: fault.name)
def test_the_step_of_a_fault_of_experts_is_named(fault: Fault, mixture: ModelPair) -> None:
    with fault.active():
        failure = mixture.failure(Optimizations.all(), fault.batch, build=fault.building(mixture.build))
    assert failure.startswith(f"step {fault.step},"), failure
    assert re.search(fault.place, failure), failure
