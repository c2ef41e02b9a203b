"""In which dtype PyTorch's attention computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen2_npu.ops.attention import sdpa


@pytest.mark.parametrize(
    ("dtype", "queries", "computed"),
    [
        (torch.float32, 1, torch.float32),
        (torch.float16, 1, torch.float32),
        (torch.float16, 2, torch.float32),
        (torch.bfloat16, 1, torch.float32),
        (torch.bfloat16, 2, torch.bfloat16),
    ],
)
def test_slow_kernels_of_the_cpu_are_gone_around(
    dtype: torch.dtype, queries: int, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **arguments: object) -> Tensor:
        seen.append((q.dtype, k.dtype, v.dtype))
        return attention(q, k, v, **arguments)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", watched)
    q, k = torch.ones(1, 2, queries, 8, dtype=dtype), torch.ones(1, 2, 3, 8, dtype=dtype)
    assert sdpa.attend(q, k, k, scale=1.0).dtype == dtype
    assert seen == [(computed,) * 3]
