"""The plainest attention: float64, a bool of visible keys, heads first."""

from __future__ import annotations

import torch
from torch import Tensor

NQ, NKV, D = 4, 2, 16
SCALE = 0.3
HEADS = {"num_heads": NQ, "num_key_value_heads": NKV}
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def random_qkv(batch: int, q_len: int, kv_len: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """query, key and value, BNSD."""
    generator = torch.Generator().manual_seed(batch + 7 * q_len + 31 * kv_len)
    shapes = [(batch, NQ, q_len, D), (batch, NKV, kv_len, D), (batch, NKV, kv_len, D)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def to_layout(tensor: Tensor, layout: str) -> Tensor:
    """A BNSD tensor in another layout, contiguous."""
    if layout == "BSND":
        return tensor.transpose(1, 2).contiguous()
    return tensor.transpose(1, 2).flatten(2).contiguous() if layout == "BSH" else tensor


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float = SCALE) -> Tensor:
    """float64 (B, Nq, Sq, D); rows that keep nothing are 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~keep, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


def log_sum_exp(q: Tensor, k: Tensor, keep: Tensor, scale: float = SCALE) -> Tensor:
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~keep, -torch.inf).logsumexp(-1, keepdim=True)


def assert_near(ours: Tensor, want: Tensor) -> None:
    """One rounding of the dtype, and what fp32 loses before it."""
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[ours.dtype]
    torch.testing.assert_close(ours.double(), want, rtol=tolerance, atol=tolerance)
