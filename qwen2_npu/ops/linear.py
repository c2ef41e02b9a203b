"""x·wᵀ + b as nn.Linear computes it; on an x86 CPU a few rows take another way than PyTorch's own where that is faster.

- float32, few rows: BLAS shares one product badly among the threads, and one row not at all. Cut along the outputs into
  as many products as there are threads, each thread streams its own part of the weight.
- bfloat16, one row: PyTorch calls oneDNN's matrix product. Its own product of a matrix with a vector, which it has for
  where oneDNN is off, reads the weight more than twice as fast.

Nothing is copied or repacked. docs/performance.md has the measurement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2_npu.ops.checks import is_readable

MAX_ROWS = 256
"""Rows up to which the parts are faster than one product; above, one product keeps every thread busy."""
MIN_WEIGHT = 1 << 19
"""Elements of the smallest weight worth cutting: below, starting the products costs what they save."""

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def faster_product(rows: int, weight: Tensor) -> Product | None:
    """What computes ``rows`` rows times ``weight`` (N, K) on a CPU faster than F.linear; None where nothing does."""
    if not weight.is_contiguous() or not _measured_here():
        return None
    if weight.dtype == torch.bfloat16:
        return without_onednn if rows == 1 else None
    return in_parts if parts(rows, weight) > 1 else None


@cache
def _measured_here() -> bool:
    """x86 with AVX2 or later: what this rests on was not measured on other processors."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def parts(rows: int, weight: Tensor) -> int:
    """Into how many products to cut ``rows`` rows times ``weight`` (N, K): one per thread, or 1 to leave it whole."""
    if weight.dtype != torch.float32 or rows > MAX_ROWS:
        return 1
    threads = torch.get_num_threads()
    return threads if weight.numel() >= MIN_WEIGHT and weight.shape[0] % threads == 0 else 1


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
    if x.dtype != weight.dtype or not (is_readable(weight) and is_readable(x)) or x.shape[-1:] != weight.shape[1:]:
        return F.linear(x, weight, bias)
    product = faster_product(x.numel() // max(weight.shape[1], 1), weight) or F.linear
    return product(x, weight, bias)


def in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One product per thread."""
    (outputs, inputs), rows = weight.shape, x.numel() // weight.shape[1]
    count = parts(rows, weight)
    cut = weight.view(count, outputs // count, inputs).transpose(1, 2)
    products = torch.bmm(x.reshape(rows, inputs).expand(count, rows, inputs), cut)
    out = products.transpose(0, 1).reshape(*x.shape[:-1], outputs)
    return out if bias is None else out.add_(bias)


def without_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's product with oneDNN off."""
    with _onednn_off():
        return F.linear(x, weight, bias)


_switch = threading.Lock()
_inside = 0
_was_on = True


@contextmanager
def _onednn_off() -> Iterator[None]:
    """torch.backends.mkldnn.flags without its other switches, for threads that overlap: the switch is one for the whole
    process, and the last to leave puts it back. Meanwhile others' products are right, whatever computes them.
    """
    global _inside, _was_on
    with _switch:
        if not _inside:
            _was_on = torch._C._get_mkldnn_enabled()
        _inside += 1
        torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        with _switch:
            _inside -= 1
            if not _inside:
                torch._C._set_mkldnn_enabled(_was_on)


_library = torch.library.Library("qwen2_npu", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", linear, "CPU")
_library.impl("linear", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]), "Meta")
IN_GRAPHS = torch.ops.qwen2_npu.linear.default
""":func:`linear` as an operator that a compiled graph may hold, for data on a CPU."""
