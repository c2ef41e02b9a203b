"""Operators that the emulated device computes by functions of its own rather than by PyTorch's CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu.emulator.eager import operators
from qwen2_npu.emulator.eager.operators import accepted

Tensor = torch.Tensor

TABLE: dict[str, Callable[..., Any]] = dict(operators.TABLE)
"""Operator name -> function of CPU tensors over device memory. Additions count until the kernels are registered."""


def _copy_from_and_resize(x: Tensor, target: Tensor) -> Tensor:
    """Copies between devices; how torch_npu's own fallback to the CPU brings results back."""
    return target.resize_(x.size()).copy_(x)


DEVICE_TABLE: dict[str, Callable[..., Any]] = {"_copy_from_and_resize": _copy_from_and_resize}
"""Operator name -> function of the npu tensors themselves."""

DECOMPOSED = (
    "aten::one_hot",
    "aten::max.out",
    "aten::min.out",
    "aten::nanmean.out",
    "aten::lstm.input",
    "aten::lstm.data",
    "aten::gru.input",
    "aten::lstm_cell",
    "aten::_pad_packed_sequence",
    "aten::slogdet",
)
"""Composite operators that torch_npu overrides above autograd by calls of CANN: PyTorch's own are put back."""

AROUND: dict[str, Callable[..., Any]] = {"aten::one_hot": accepted.one_hot_of_int32}
"""Name in ``DECOMPOSED`` -> what makes the kernel of PyTorch's own."""
