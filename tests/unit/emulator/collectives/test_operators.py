from __future__ import annotations

import pytest
import torch

from qwen2_npu.emulator.collectives.errors import CollectiveError, HcclResult
from qwen2_npu.emulator.collectives.operators import TABLE, mm_all_reduce

A, B = torch.ones(2, 4).half(), torch.ones(4, 3).half()


@pytest.mark.parametrize(
    ("arguments", "named", "error", "words"),
    [
        ((A, B), {"dequant_scale": torch.ones(3)}, ValueError, "dequant_scale is a torch.float32 tensor"),
        ((A, B), {"comm_quant_mode": 1}, ValueError, "comm_quant_mode is 1"),
        ((A, B), {"comm_turn": 2}, ValueError, "comm_turn is 2"),
        ((A, B), {"reduce_op": "max"}, ValueError, "reduce_op is 'max'; supported: 'sum'"),
        ((A.float(), B.float()), {}, ValueError, "x1 is a torch.float32 .* bfloat16 or float16 on an NPU"),
        ((A, B.bfloat16()), {}, ValueError, "x2 is a torch.bfloat16 .* torch.float16"),
        ((A, B.t()), {}, ValueError, r"x2 is .* shape \(3, 4\); supported: \(K, N\) with K = 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_operator_refuses(arguments: tuple, named: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mm_all_reduce(*arguments, "nobody", **named)


def test_an_unknown_communicator_is_named() -> None:
    with pytest.raises(CollectiveError, match="no HCCL communicator is called 'nobody'") as raised:
        mm_all_reduce(A, B, "nobody")
    assert raised.value.code is HcclResult.NOT_FOUND


def test_table_names_operators_of_torch_npu() -> None:
    pytest.importorskip("torch_npu")
    assert all(hasattr(torch.ops.npu, name) for name in TABLE)
