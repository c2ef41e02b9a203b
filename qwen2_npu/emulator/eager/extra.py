"""torch_npu's own operators that ordinary PyTorch computes: their meaning on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def _matmul_backward(grad: Tensor, a: Tensor, b: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    return _gradients(torch.matmul, (a, b), grad, mask)


def _gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor, mask: Any = None) -> Any:
    """Gradients of ``function`` through PyTorch's own formulas; None where ``mask`` is false."""
    mask = mask or [True] * len(inputs)
    with torch.enable_grad(), _autograd_again():
        leaves = [value.detach().requires_grad_(wanted) for value, wanted in zip(inputs, mask, strict=True)]
        out = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad))
    return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


def _autograd_again() -> Any:
    """Undo that a kernel runs below autograd."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


TABLE: dict[str, Callable[..., Any]] = {
    "_copy_from_and_resize": lambda x, target: target.resize_(x.size()).copy_(x),
    "matmul_backward": _matmul_backward,
    "npu_format_cast": lambda x, *_: x.clone(),
    "npu_dtype_cast": lambda x, dtype: x.to(dtype),
    "_npu_dtype_cast": lambda x, dtype: x.to(dtype),
    "one_": lambda x: x.fill_(1),
    "fast_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "npu_silu": F.silu,
}
"""Operator name -> function of CPU tensors."""
