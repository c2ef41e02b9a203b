import pytest
import torch

import qwen2_npu.ops  # noqa: F401 - defines torch.ops.npu
from qwen2_npu.conformance.accuracy.intermediates import npu_operator
from qwen2_npu.optimizations import EXPERTS, LADDER
from tests.accuracy.expert_faults import EXPERT_FAULTS
from tests.accuracy.faults import FAULTS, Intercept


def test_faults_are_well_formed() -> None:
    every = (*FAULTS, *EXPERT_FAULTS)
    assert len({fault.name for fault in every}) == len(every)
    for fault in every:
        assert fault.step in (EXPERTS if fault in EXPERT_FAULTS else LADDER)
        assert bool(fault.alter) != bool(fault.patch)
        assert all(hasattr(torch.ops.npu, name) for name in fault.alter)


@pytest.mark.parametrize("func", [torch.ops.npu.npu_swiglu, torch.ops.npu.npu_swiglu.default])
def test_operators_are_recognised_with_and_without_overload(func: object) -> None:
    assert npu_operator(func) == "npu_swiglu"


@pytest.mark.parametrize("func", [torch.matmul, torch.ops.aten.add, torch.Tensor.float])
def test_other_functions_are_not(func: object) -> None:
    assert npu_operator(func) is None


def test_intercept_alters_arguments_however_they_are_passed() -> None:
    def double(arguments: dict[str, object]) -> None:
        assert arguments["epsilon"] in (1e-6, 0.5)
        arguments["epsilon"] = 1.0

    x, gamma = torch.ones(1, 4), torch.ones(4)
    expected = torch.ops.npu.npu_rms_norm(x, gamma, 1.0)[0]
    with Intercept({"npu_rms_norm": double}) as intercept:
        for got in (
            torch.ops.npu.npu_rms_norm(x, gamma),
            torch.ops.npu.npu_rms_norm(x, gamma, 0.5),
            torch.ops.npu.npu_rms_norm(x, gamma=gamma, epsilon=0.5),
        ):
            torch.testing.assert_close(got[0], expected, rtol=0, atol=0)
    assert intercept.calls == 3
    assert not torch.equal(torch.ops.npu.npu_rms_norm(x, gamma)[0], expected)
