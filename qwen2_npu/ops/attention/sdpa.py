"""The two primitives under every attention operator: masked attention, and the log-sum-exp of its scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def _computes_wide(q: Tensor) -> bool:
    """Whether to go through fp32: PyTorch's CPU kernels are many times slower in fp16, and in bf16 for one query."""
    return q.is_cpu and (q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and q.shape[2] == 1))


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, keep: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(scale · q kᵀ, where kept) v.

    Args:
        q: (B, N, Sq, D); k, v: (B, N or a divisor of N, Skv, D), any strides.
        keep: bool, broadcastable to (B, N, Sq, Skv). The result is undefined in rows that keep nothing.
        causal: query i sees keys 0 … i; excludes `keep`.

    Returns:
        (B, N, Sq, D) in q's dtype.
    """
    dtype = q.dtype
    if _computes_wide(q):
        q, k, v = q.float(), k.float(), v.float()
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=keep, is_causal=causal, scale=scale, enable_gqa=bool(q.shape[1] != k.shape[1])
    )
    return out if out.dtype == dtype else out.to(dtype)


def log_sum_exp(
    q: Tensor, k: Tensor, *, scale: float, keep: Tensor | None = None, fill: float = float("-inf")
) -> Tensor:
    """log Σ exp(scale · q kᵀ) over the kept keys, fp32, (B, N, Sq, 1); other scores become `fill`."""
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = q.float().unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
    scores = torch.matmul(grouped, k.float().transpose(-1, -2)) * scale
    scores = scores.unflatten(2, (heads // kv_heads, q.shape[2])).flatten(1, 2)
    if keep is not None:
        scores = scores.masked_fill(~keep, fill)
    return scores.logsumexp(-1, keepdim=True)
