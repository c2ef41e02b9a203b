"""x·wᵀ + b as nn.Linear computes it; on a CPU a few rows in float32 go one part of the weight per thread.

BLAS libraries share one large product among the threads badly where it has few rows, and a product of one row not at
all. Cut along the outputs into as many products as there are threads, each thread streams its own part of the weight.
Nothing is copied or repacked. docs/performance.md has the measurement.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2_npu.ops.checks import is_readable

MAX_ROWS = 256
"""Rows up to which the parts are faster than one product; above, one product keeps every thread busy."""
MIN_WEIGHT = 1 << 19
"""Elements of the smallest weight worth cutting: below, starting the products costs what they save."""


def parts(rows: int, weight: Tensor) -> int:
    """Into how many products to cut ``rows`` rows times ``weight`` (N, K): one per thread, or 1 to leave it whole."""
    if weight.dtype != torch.float32 or rows > MAX_ROWS:
        return 1
    threads = torch.get_num_threads()
    worthwhile = weight.numel() >= MIN_WEIGHT and weight.shape[0] % threads == 0 and weight.is_contiguous()
    return threads if worthwhile else 1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x·weightᵀ + bias``.

    Args:
        x: (..., K).
        weight: (N, K), as nn.Linear keeps it.
        bias: (N,) or None.

    Returns:
        (..., N) in the dtype of ``x``.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)  # in a graph a pass of the compiler sees to it
    outputs, inputs = weight.shape
    rows = x.numel() // max(inputs, 1)
    count = parts(rows, weight)
    if count == 1 or x.shape[-1] != inputs or x.dtype != weight.dtype or not (is_readable(weight) and is_readable(x)):
        return F.linear(x, weight, bias)
    cut = weight.view(count, outputs // count, inputs).transpose(1, 2)
    products = torch.bmm(x.reshape(rows, inputs).expand(count, rows, inputs), cut)
    out = products.transpose(0, 1).reshape(*x.shape[:-1], outputs)
    return out if bias is None else out.add_(bias)
