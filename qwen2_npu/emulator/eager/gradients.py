"""Gradients of a function of CPU tensors, for kernels that run below autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Tensor = torch.Tensor


@contextlib.contextmanager
def autograd_again() -> Iterator[None]:
    """Undo that a kernel runs below autograd."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded),
    ):
        yield


def gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grad: Tensor | Sequence[Tensor | None],
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)`` through PyTorch's own formulas.

    Args:
        function: of the inputs, to a tensor or a tuple of tensors.
        inputs: None where an optional one is not given.
        grad: gradients of the results; None counts as zero.
        wanted: which inputs to differentiate by; all, if not said.

    Returns:
        One gradient per input, None where none is wanted or the input is None. Zeros where the result does not
        depend on it.
    """
    wanted = [True] * len(inputs) if wanted is None else wanted
    with autograd_again():
        leaves = [
            None if value is None else value.detach().clone().requires_grad_(bool(want) and value.is_floating_point())
            for value, want in zip(inputs, wanted, strict=True)
        ]
        result = function(*leaves)
        results, grads = ([result], [grad]) if isinstance(grad, Tensor) else (list(result), list(grad))
        pairs = [
            (out, given) for out, given in zip(results, grads, strict=True) if given is not None and out.requires_grad
        ]
        sought = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                sought,
                [given.to(out.dtype).view_as(out) for out, given in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
            if pairs and sought
            else [torch.zeros_like(leaf) for leaf in sought]
        )
        return tuple(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of ``function(x)`` by ``x``."""
    found = gradients(function, (x,), grad)[0]
    assert found is not None, "the only input is always wanted"
    return found
