"""Running one of torch_npu's own operators on the emulated NPU against a formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

Tensor = torch.Tensor

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2**-8},
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
}
"""One rounding of a result of size 1; in float32 the sums before it, too."""


def on_npu(value: Any) -> Any:
    def move(item: Any) -> Any:
        return item.detach().to("npu").requires_grad_(item.requires_grad) if isinstance(item, Tensor) else item

    return tree_map(move, value)


def wide(value: Any) -> Any:
    """float64 in place of floating point."""

    def widen(item: Any) -> Any:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item.detach().double().requires_grad_(item.requires_grad)
        return item

    return tree_map(widen, value)


def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, seed: int = 0) -> Tensor:
    """Standard normal numbers, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


def close(found: Any, expected: Any, what: str) -> None:
    """Tensors of the same shape with the values of ``expected``, which is float64 where it is floating point."""
    left, right = tree_leaves(found), tree_leaves(expected)
    assert len(left) == len(right), f"{what}: {len(left)} results in place of {len(right)}"
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        if other is None:
            continue
        assert one.device.type == "npu", f"{what}, result {index}: on {one.device}"
        assert one.shape == other.shape, f"{what}, result {index}: {tuple(one.shape)} in place of {tuple(other.shape)}"
        if not other.is_floating_point():
            assert torch.equal(one.cpu(), other.to(one.dtype)), f"{what}, result {index}"
            continue
        torch.testing.assert_close(
            one.detach().cpu().double(),
            other.detach().double(),
            **TOLERANCE[one.dtype],
            msg=lambda text, index=index: f"{what}, result {index}: {text}",
        )


def check(
    operator: Callable[..., Any],
    formula: Callable[..., Any],
    *args: Any,
    differentiate: Sequence[int] = (),
    meta: bool = True,
    **kwargs: Any,
) -> None:
    """``operator`` on npu copies of the arguments gives what ``formula`` gives in float64.

    Args:
        operator: of ``torch.ops.npu``.
        formula: takes the same arguments; None in place of a result means that it is not compared.
        differentiate: results whose gradients by the arguments that require them are compared, too.
        meta: shapes and dtypes are also those of torch_npu's own meta kernel.
    """
    name = str(operator)
    given, more = on_npu((args, kwargs))
    found = operator(*given, **more)
    wide_args, wide_kwargs = wide((args, kwargs))
    expected = formula(*wide_args, **wide_kwargs)
    found_list = [found] if isinstance(found, Tensor) else list(found)
    expected_list = [expected] if isinstance(expected, Tensor) else list(expected)
    close(found_list, expected_list, name)
    if meta:
        _check_meta(operator, args, kwargs, found_list)
    if differentiate:
        leaves = [leaf for leaf in tree_leaves((given, more)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        wide_leaves = [leaf for leaf in tree_leaves((wide_args, wide_kwargs)) if isinstance(leaf, Tensor)]
        wide_leaves = [leaf for leaf in wide_leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(_weighted(found_list, differentiate), leaves)
        wanted = torch.autograd.grad(_weighted(expected_list, differentiate), wide_leaves)
        close(gradients, wanted, f"gradient of {name}")


def _weighted(results: list[Any], chosen: Sequence[int]) -> Tensor:
    """A sum in which every element of the chosen results has a weight of its own."""
    total: Any = 0
    for index in chosen:
        result = results[index].double()
        weights = torch.linspace(-1, 1.5, result.numel(), dtype=torch.float64).reshape(result.shape)
        total = total + (result * weights.to(result.device)).sum()
    return total


def _check_meta(operator: Any, args: Any, kwargs: Any, found: list[Any]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():

        def fake(item: Any) -> Any:
            return mode.from_tensor(item).to("npu") if isinstance(item, Tensor) else item

        fake_args, fake_kwargs = tree_map(fake, (args, kwargs))
        promised = operator(*fake_args, **fake_kwargs)
    promised = [promised] if isinstance(promised, Tensor) else list(promised)
    for index, (one, other) in enumerate(zip(found, promised, strict=True)):
        if isinstance(other, Tensor) and other.numel():
            assert (one.shape, one.dtype) == (other.shape, other.dtype), (
                f"{operator}, result {index}: {tuple(one.shape)}, {one.dtype}; torch_npu's meta kernel says "
                f"{tuple(other.shape)}, {other.dtype}"
            )
