from __future__ import annotations

import pytest
import torch

from qwen2_npu.emulator.collectives.errors import CollectiveError, HcclResult
from qwen2_npu.emulator.collectives.reduction import COMPUTED_IN, OPERATIONS, check, identity


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", COMPUTED_IN, ids=str)
def test_identity_changes_nothing(dtype: torch.dtype, operation: str) -> None:
    x = torch.tensor([-3, 0, 5]).to(dtype)
    combine = {"sum": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum}[operation]
    assert torch.equal(combine(x, identity(x, operation)), x)


@pytest.mark.parametrize(
    ("dtype", "operation", "code"),
    [
        (torch.float64, "sum", HcclResult.NOT_SUPPORT),
        (torch.bool, "max", HcclResult.NOT_SUPPORT),
        (torch.bfloat16, "prod", HcclResult.NOT_SUPPORT),
        (torch.int16, "prod", HcclResult.NOT_SUPPORT),
        (torch.float32, "avg", HcclResult.PARA),
    ],
    ids=str,
)
def test_what_hccl_does_not_reduce_is_refused(dtype: torch.dtype, operation: str, code: HcclResult) -> None:
    with pytest.raises(CollectiveError, match=str(dtype) if code is HcclResult.NOT_SUPPORT else operation) as raised:
        check(dtype, operation)
    assert raised.value.code is code


def test_what_hccl_reduces_passes() -> None:
    for dtype in COMPUTED_IN:
        check(dtype, "sum")
