"""Sorting tokens by expert and putting them back, and the gradients: npu_moe_token_permute and _unpermute.

``sorted_indices[i]`` is the row that choice ``i`` has among the sorted ones; token ``t`` makes the choices
``t · k … t · k + k − 1``. Sums are in fp32, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor


def _refuse(operator: str, padded_mode: bool, restore_shape: Sequence[int] | None = None) -> None:
    if padded_mode:
        raise NotImplementedError(f"{operator}: padded_mode=True is not supported, nor is it on hardware; pass False")
    if restore_shape is not None:
        raise NotImplementedError(f"{operator}: restore_shape belongs to padded_mode=True, which is not supported")


def permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """(tokens in the order of their experts, sorted_indices in int32).

    Args:
        tokens: (T, H). indices: (T,) or (T, k), the experts of each token.
        num_out_tokens: how many rows to return; None and 0 mean all, a negative number all but so many.
    """
    _refuse("npu_moe_token_permute", padded_mode)
    top = 1 if indices.dim() == 1 else indices.shape[1]
    order = indices.reshape(-1).argsort(stable=True)
    return tokens[order[: num_out_tokens or None] // top], order.argsort().int()


def _rows(x: Tensor, sorted_indices: Tensor) -> Tensor:
    """``x[sorted_indices]`` in fp32; zeros for rows that num_out_tokens dropped."""
    index = sorted_indices.long()
    kept = index < x.shape[0]
    rows = x.new_zeros(index.numel(), x.shape[1], dtype=torch.float32)
    rows[kept] = x[index[kept]].float()
    return rows


def _put(rows: Tensor, sorted_indices: Tensor, count: int) -> Tensor:
    """The inverse of ``_rows``: (count, H)."""
    index = sorted_indices.long()
    kept = index < count
    out = rows.new_zeros(count, rows.shape[1])
    out[index[kept]] = rows[kept]
    return out


def permute_grad_v2(
    grad: Tensor, sorted_indices: Tensor, count: int, dtype: torch.dtype, top: int, padded_mode: bool = False
) -> Tensor:
    """(T, H): the sum of the gradients of each token's rows."""
    _refuse("npu_moe_token_permute_grad_v2", padded_mode)
    return _rows(grad, sorted_indices).view(count, top, grad.shape[1]).sum(1).to(dtype)


def permute_grad(
    tokens: Tensor, grad: Tensor, indices: Tensor, sorted_indices: Tensor, padded_mode: bool = False
) -> Tensor:
    top = 1 if indices.dim() == 1 else indices.shape[1]
    return permute_grad_v2(grad, sorted_indices, tokens.shape[0], tokens.dtype, top, padded_mode)


def unpermute(
    permuted: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """out[t] = Σ_j probs[t, j] · permuted[sorted_indices[t · k + j]]; without ``probs``, k is 1."""
    _refuse("npu_moe_token_unpermute", padded_mode, restore_shape)
    rows = _rows(permuted, sorted_indices)
    if probs is not None:
        rows = (rows.view(*probs.shape, -1) * probs.float().unsqueeze(-1)).sum(1)
    return rows.to(permuted.dtype)


def unpermute_for_training(permuted: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(``unpermute``, what the gradient needs)"""
    return unpermute(permuted, *args, **kwargs), permuted.clone()


def unpermute_grad_v2(
    grad: Tensor,
    sorted_indices: Tensor,
    count: int,
    dtype: torch.dtype,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
    permuted: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients by the permuted tokens, (count, H), and by ``probs``."""
    _refuse("npu_moe_token_unpermute_grad_v2", padded_mode, restore_shape)
    if probs is None:
        return _put(grad.float(), sorted_indices, count).to(dtype), None
    if permuted is None:
        raise ValueError("npu_moe_token_unpermute_grad_v2: the gradient by probs needs permuted_tokens")
    spread = grad.float().unsqueeze(1)
    by_rows = (spread * probs.float().unsqueeze(-1)).reshape(-1, grad.shape[1])
    by_probs = (spread * _rows(permuted, sorted_indices).view(*probs.shape, -1)).sum(-1)
    return _put(by_rows, sorted_indices, count).to(dtype), by_probs.to(probs.dtype)


def unpermute_grad(
    permuted: Tensor,
    grad: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    count, dtype = permuted.shape[0], permuted.dtype
    return unpermute_grad_v2(grad, sorted_indices, count, dtype, probs, padded_mode, restore_shape, permuted)


TABLE: dict[str, Callable[..., Any]] = {
    "npu_moe_token_permute": permute,
    "npu_moe_token_permute_grad": permute_grad,
    "npu_moe_token_permute_grad_v2": permute_grad_v2,
    "npu_moe_token_unpermute": unpermute,
    "_npu_moe_token_unpermute": unpermute_for_training,
    "npu_moe_token_unpermute_grad": unpermute_grad,
    "npu_moe_token_unpermute_grad_v2": unpermute_grad_v2,
}
