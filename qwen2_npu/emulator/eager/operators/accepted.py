"""Arguments that hardware's kernels of PyTorch's operators take and PyTorch's CPU kernels do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Tensor = torch.Tensor

INDICES = {
    "nll_loss_forward": "target",
    "nll_loss_backward": "target",
    "nll_loss2d_forward": "target",
    "nll_loss2d_backward": "target",
    "take": "index",
}
"""Operator -> its argument of indices, which may be int32."""


def with_int32(op: torch._ops.OpOverload, name: str, compute: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``compute`` (default: ``op`` itself), whose argument ``name`` may be int32."""
    position = [argument.name for argument in op._schema.arguments].index(name)
    inner = op if compute is None else compute

    def run(*args: Any, **kwargs: Any) -> Any:
        index = args[position] if position < len(args) else kwargs[name]
        if index.dtype is torch.int32:
            if position < len(args):
                args = (*args[:position], index.long(), *args[position + 1 :])
            else:
                kwargs = {**kwargs, name: index.long()}
        return inner(*args, **kwargs)

    return run


def one_hot_of_int32(one_hot: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``one_hot``, also of int32, in which its result is then."""

    def run(x: Tensor, num_classes: int = -1) -> Tensor:
        return one_hot(x.long(), num_classes).int() if x.dtype is torch.int32 else one_hot(x, num_classes)

    return run


def half_to_float(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """A softmax whose ``half_to_float`` asks for the fp32 result of a half."""

    def run(x: Tensor, dim: int, half_to_float: bool, **out: Tensor) -> Tensor:
        if not half_to_float:
            return op(x, dim, False, **out)
        if x.dtype is not torch.float16:
            raise RuntimeError(f"{op}: half_to_float needs a float16 input, not {x.dtype}")
        return op(x.float(), dim, False, **out)

    return run


def float_to_half(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The gradient of a softmax; an ``input_dtype`` other than the gradient's is that of the result."""

    def run(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype, **out: Tensor) -> Tensor:
        if input_dtype is grad.dtype:
            return op(grad, output, dim, input_dtype, **out)
        result = op.overloadpacket.default(grad, output, dim, grad.dtype).to(input_dtype)
        for target in out.values():
            return target.resize_(result.shape).copy_(result)
        return result

    return run


def number_in_place_of_a_tensor(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """``op`` of two tensors, one of which may be a number.

    PyTorch makes a tensor of the number in ``x |= 4``, and a number of it again on the way to a kernel in Python. Its
    overload for numbers promotes dtypes as the tensor did.
    """

    def run(x: Any, y: Any, **out: Tensor) -> Tensor:
        chosen = op if isinstance(x, Tensor) and isinstance(y, Tensor) else op.overloadpacket
        return chosen(x, y, **out)

    return run


def overloads(name: str) -> dict[str, torch._ops.OpOverload]:
    """The overloads of an operator of PyTorch, by the names that a table of operators uses."""
    packet = getattr(torch.ops.aten, name)
    return {
        name if overload == "default" else f"{name}.{overload}": getattr(packet, overload)
        for overload in packet.overloads()
    }


MAKERS: dict[str, Callable[[torch._ops.OpOverload], Callable[..., Any]]] = {
    "_softmax": half_to_float,
    "_log_softmax": half_to_float,
    "_softmax_backward_data": float_to_half,
    "_log_softmax_backward_data": float_to_half,
    **{name: partial(with_int32, name=index) for name, index in INDICES.items()},
}
"""Operator -> what makes the function of each of its overloads."""

TABLE: dict[str, Callable[..., Any]] = {
    **{qualified: make(op) for name, make in MAKERS.items() for qualified, op in overloads(name).items()},
    **{
        qualified: number_in_place_of_a_tensor(op)
        for name in ("bitwise_and", "bitwise_or", "bitwise_xor")
        for qualified, op in overloads(name).items()
        if op._overloadname in ("Tensor", "Tensor_out")
    },
}
