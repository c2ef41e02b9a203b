"""What every kernel checks, and the errors it raises when a check fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen2_npu.ops.schemas import UNSUPPORTED

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)


def describe(value: object) -> str:
    """A short text for an error message: tensors by dtype and shape, also in lists, everything else by repr."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, list):
        return f"[{', '.join(map(describe, value))}]"
    return repr(value)


def invalid(op: str, argument: str, value: object, supported: str) -> ValueError:
    """The ValueError of `op` for `argument`: names the operator, the argument, its value and what is supported."""
    return ValueError(f"npu::{op}: {argument} is {describe(value)}; supported: {supported}")


def reject_unsupported(op: str, arguments: dict[str, Any]) -> None:
    """Raise for every argument that the schema has, these kernels lack, and the caller changed.

    Args:
        op: operator name.
        arguments: what the caller passed beyond the kernel's own parameters.

    Raises:
        TypeError: the schema has no such argument.
        ValueError: the argument is not at its default.
    """
    defaults = UNSUPPORTED[op]
    for name, value in arguments.items():
        if name not in defaults:
            raise TypeError(f"npu::{op} has no argument {name!r}")
        default = defaults[name]
        if isinstance(value, Tensor) or value != default:
            raise invalid(op, name, value, f"only the default {default!r}: the portable kernels do not implement it")


def check_float(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise invalid(op, argument, tensor, "dtype float32, bfloat16 or float16")


def check_same_dtype(op: str, first: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.dtype != first.dtype:
            raise invalid(op, name, tensor, f"the dtype of the first input, {first.dtype}")


def is_plain(tensor: Tensor) -> bool:
    """True for an ordinary tensor that holds data now: not fake, not functionalised, not being traced."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type != "meta"
        and not torch.compiler.is_compiling()
    )


def is_readable(tensor: Tensor) -> bool:
    """True where reading the values costs no device synchronisation: a plain tensor on the CPU."""
    return tensor.is_cpu and is_plain(tensor)
