"""What ordinary models call, as functions of CPU tensors: name -> (function, inputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def u(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def i(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


A, B = x(3, 4), x(3, 4, seed=1)
POSITIVE = u(3, 4) + 0.1
IMAGE = x(1, 3, 8, 8)

FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    # layers
    "linear": (F.linear, (x(2, 3, 4), x(5, 4), x(5))),
    "mlp": (lambda a, w, v: F.linear(F.silu(F.linear(a, w)), v), (A, x(6, 4), x(4, 6))),
    "layer_norm": (lambda a, w, b: F.layer_norm(a, (4,), w, b), (A, x(4), x(4))),
    "group_norm": (lambda a, w, b: F.group_norm(a, 2, w, b), (x(2, 4, 3, 3), x(4), x(4))),
    "batch_norm": (F.batch_norm, (x(2, 3, 4, 4), x(3), u(3), x(3), x(3))),
    "rms_norm": (lambda a, w: F.rms_norm(a, (4,), w), (A, x(4))),
    "embedding": (F.embedding, (i(5, 3), x(5, 4))),
    "conv1d": (F.conv1d, (x(1, 3, 8), x(4, 3, 3), x(4))),
    "conv2d": (lambda a, w, b: F.conv2d(a, w, b, padding=1), (IMAGE, x(4, 3, 3, 3), x(4))),
    "conv2d groups": (lambda a, w: F.conv2d(a, w, groups=3, stride=2), (IMAGE, x(3, 1, 3, 3))),
    "conv3d": (F.conv3d, (x(1, 3, 4, 4, 4), x(4, 3, 3, 3, 3), x(4))),
    "conv_transpose2d": (lambda a, w, b: F.conv_transpose2d(a, w, b, stride=2), (x(1, 3, 4, 4), x(3, 4, 3, 3), x(4))),
    "max_pool2d": (lambda a: F.max_pool2d(a, 2), (IMAGE,)),
    "avg_pool2d": (lambda a: F.avg_pool2d(a, 2), (IMAGE,)),
    "adaptive_avg_pool2d": (lambda a: F.adaptive_avg_pool2d(a, 2), (IMAGE,)),
    "interpolate": (lambda a: F.interpolate(a, scale_factor=2), (IMAGE,)),
    "grid_sample": (lambda a, g: F.grid_sample(a, g, align_corners=False), (x(1, 2, 3, 3), u(1, 2, 2, 2))),
    "softmax": (lambda a: F.softmax(a, -1), (A,)),
    "log_softmax": (lambda a: F.log_softmax(a, -1), (A,)),
    "cross_entropy": (F.cross_entropy, (x(3, 5), i(5, 3))),
    "cross_entropy ignoring": (lambda a, t: F.cross_entropy(a, t, ignore_index=1), (x(3, 5), i(5, 3))),
    "nll_loss": (lambda a, t: F.nll_loss(a, t, reduction="none"), (x(3, 5), i(5, 3))),
    "mse_loss": (F.mse_loss, (A, B)),
    "dropout in eval": (lambda a: F.dropout(a, 0.5, False) + 1, (A,)),
    # activations
    "gelu tanh": (lambda a: F.gelu(a, approximate="tanh"), (A,)),
    "silu": (F.silu, (A,)),
    "mish": (F.mish, (A,)),
    "elu": (F.elu, (A,)),
    "selu": (F.selu, (A,)),
    "relu": (F.relu, (A,)),
    "relu6": (F.relu6, (A,)),
    "leaky_relu": (F.leaky_relu, (A,)),
    "prelu": (F.prelu, (x(2, 3, 4), x(3))),
    "hardswish": (F.hardswish, (A,)),
    "hardsigmoid": (F.hardsigmoid, (A,)),
    "hardtanh": (F.hardtanh, (A,)),
    "glu": (F.glu, (A,)),
    "logsigmoid": (F.logsigmoid, (A,)),
    "softsign": (F.softsign, (A,)),
    "tanhshrink": (F.tanhshrink, (A,)),
    "threshold": (lambda a: F.threshold(a, 0.1, 0.2), (A,)),
    # products
    "mm": (torch.mm, (A, x(4, 5))),
    "bmm": (torch.bmm, (x(2, 3, 4), x(2, 4, 5))),
    "matmul 4d": (torch.matmul, (x(2, 3, 4, 5), x(2, 3, 5, 4))),
    "addmm": (lambda a, b, c: torch.addmm(a, b, c, beta=0.5, alpha=2), (x(3, 5), A, x(4, 5))),
    "baddbmm": (torch.baddbmm, (x(2, 3, 5), x(2, 3, 4), x(2, 4, 5))),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (x(2, 3, 4), x(2, 4, 5))),
    "outer": (torch.outer, (x(3), x(4))),
    # creation
    "arange": (lambda a: a + torch.arange(4, device=a.device), (A,)),
    "full": (lambda a: a + torch.full((4,), 2.5, device=a.device), (A,)),
    "ones": (lambda a: a + torch.ones(4, device=a.device), (A,)),
    "zeros": (lambda a: a + torch.zeros(4, device=a.device), (A,)),
    "full_like": (lambda a: torch.full_like(a, 3), (A,)),
    "zeros_like": (torch.zeros_like, (A,)),
    "ones_like": (torch.ones_like, (A,)),
    "new_full": (lambda a: a.new_full((2,), 4), (A,)),
    "linspace": (lambda a: a + torch.linspace(0, 1, 4, device=a.device), (A,)),
    # comparison and selection
    "eq": (torch.eq, (i(3, 9), i(3, 9, seed=1))),
    "lt": (torch.lt, (A, B)),
    "logical": (lambda a, b: ((a > 0) & (b > 0)) | ~(a > b), (A, B)),
    "logical_and": (torch.logical_and, (A > 0, B > 0)),
    "isinf": (torch.isinf, (A,)),
    "where": (torch.where, (A > 0, A, B)),
    "masked_fill": (lambda a: a.masked_fill(a > 0, 1.5), (A,)),
    "maximum": (torch.maximum, (A, B)),
    "clamp": (lambda a: a.clamp(-0.5, 0.5), (A,)),
    "clamp below": (lambda a: a.clamp(min=0), (A,)),
    "clamp integers": (lambda a: a.clamp(max=4), (i(9, 6),)),
    # reductions
    "sum": (lambda a: a.sum(), (A,)),
    "sum over one": (lambda a: a.sum(1, keepdim=True), (A,)),
    "mean": (lambda a: a.mean(-1), (A,)),
    "max": (lambda a: a.max(), (A,)),
    "max with index": (lambda a: a.max(-1), (A,)),
    "all": (lambda a: (a > 0).all(), (A,)),
    "any": (lambda a: (a > 0).any(-1), (A,)),
    "std": (lambda a: a.std(1), (A,)),
    "vector_norm": (lambda a: torch.linalg.vector_norm(a, dim=-1), (A,)),
    "normalize": (F.normalize, (A,)),
    "logsumexp": (lambda a: a.logsumexp(-1), (A,)),
    "argmax": (lambda a: a.argmax(-1), (A,)),
    "argmin": (lambda a: a.argmin(-1), (A,)),
    "topk": (lambda a: a.topk(2), (A,)),
    "sort": (lambda a: a.sort(-1), (A,)),
    "sort first dimension down": (lambda a: a.sort(0, descending=True), (A,)),
    "cumsum": (lambda a: a.cumsum(-1), (A,)),
    # indexing
    "gather": (lambda a, j: a.gather(1, j), (A, i(4, 3, 2))),
    "scatter": (lambda a, j, s: a.scatter(1, j, s), (A, torch.tensor([[0, 1], [1, 2], [3, 0]]), x(3, 2))),
    "scatter_add": (lambda a, j, s: a.scatter_add(1, j, s), (A, i(4, 3, 2), x(3, 2))),
    "scatter value": (lambda a, j: a.scatter(1, j, 1.5), (A, i(4, 3, 2))),
    "index_select": (lambda a, j: a.index_select(1, j), (A, i(4, 3))),
    "index": (lambda a, j: a[j], (A, i(3, 5))),
    "index by two": (lambda a, j, k: a[j, k], (A, i(3, 5), i(4, 5))),
    "index in the middle": (lambda a, j: a[:, j], (A, i(4, 5))),
    "index_add": (lambda a, j, v: a.index_add(0, j, v), (A, torch.tensor([0, 2]), x(2, 4))),
    "searchsorted": (torch.searchsorted, (torch.arange(4.0), x(3))),
    "select": (lambda a: a[1] + 1, (A,)),
    "select the last": (lambda a: a[-1] + 1, (A,)),
    "slice": (lambda a: a[1:3, ::2] + 1, (A,)),
    "slice_scatter": (lambda a, b: torch.slice_scatter(a, b, 0, 1, 3), (A, x(2, 4))),
    "select_scatter": (lambda a, b: torch.select_scatter(a, b, 0, 1), (A, x(4))),
    # shapes
    "cat": (lambda a, b: torch.cat((a, b), 1), (A, B)),
    "stack": (lambda a, b: torch.stack((a, b), 1), (A, B)),
    "split": (lambda a: (a + 1).split(2, 1), (A,)),
    "chunk": (lambda a: (a + 1).chunk(3, 1), (A,)),
    "unbind": (lambda a: (a + 1).unbind(1), (A,)),
    "pad": (lambda a: F.pad(a, (1, 2)), (A,)),
    "pad with a value": (lambda a: F.pad(a, (1, 2, 0, 1), value=1.5), (A,)),
    "pad reflecting": (lambda a: F.pad(a, (1, 2, 1, 1), mode="reflect"), (x(1, 1, 3, 4),)),
    "pad replicating": (lambda a: F.pad(a, (1, 2), mode="replicate"), (x(1, 3, 4),)),
    "pad circular": (lambda a: F.pad(a, (1, 2), mode="circular"), (x(1, 3, 4),)),
    "tile": (lambda a: a.tile(2, 3), (A,)),
    "repeat": (lambda a: a.repeat(2, 1, 3), (A,)),
    "expand": (lambda a: (a + 1).expand(2, 3, 4), (A,)),
    "flip": (lambda a: a.flip(0), (A,)),
    "tril": (lambda a: a.tril(), (A,)),
    "triu": (lambda a: a.triu(1), (A,)),
    "permute": (lambda a: (a + 1).permute(1, 0), (A,)),
    "reshape": (lambda a: (a + 1).t().reshape(2, 6), (A,)),
    "squeeze": (lambda a: (a + 1).squeeze(1), (x(3, 1, 4),)),
    "unsqueeze": (lambda a: (a + 1).unsqueeze(1), (A,)),
    "as_strided": (lambda a: a.as_strided((2, 2), (4, 1), 1) + 0, (A,)),
    "meshgrid": (lambda a, b: [g + 0 for g in torch.meshgrid(a, b, indexing="ij")], (x(3), x(4))),
    "one_hot": (lambda a: F.one_hot(a, 5), (i(5, 3),)),
    # arithmetic
    "add scaled": (lambda a, b: torch.add(a, b, alpha=2), (A, B)),
    "one minus": (lambda a: 1 - a, (A,)),
    "div": (torch.div, (A, POSITIVE)),
    "div of integers": (torch.div, (i(9, 6), i(5, 6) + 1)),
    "div floor": (lambda a, b: torch.div(a, b, rounding_mode="floor"), (A, POSITIVE)),
    "div trunc": (lambda a, b: torch.div(a, b, rounding_mode="trunc"), (i(9, 6) - 4, i(5, 6) + 1)),
    "floordiv": (lambda a, b: a // b, (i(9, 6) - 4, i(5, 6) + 1)),
    "remainder": (torch.remainder, (i(9, 6) - 4, i(5, 6) + 1)),
    "square": (lambda a: a**2, (A,)),
    "pow": (torch.pow, (POSITIVE, A)),
    "pow of a number": (lambda a: 2.0**a, (A,)),
    "sqrt": (torch.sqrt, (POSITIVE,)),
    "rsqrt": (torch.rsqrt, (POSITIVE,)),
    "exp": (torch.exp, (A,)),
    "expm1": (torch.expm1, (A,)),
    "log": (torch.log, (POSITIVE,)),
    "log2": (torch.log2, (POSITIVE,)),
    "log1p": (torch.log1p, (POSITIVE,)),
    "sin": (torch.sin, (A,)),
    "atan": (torch.atan, (A,)),
    "cosh": (torch.cosh, (A,)),
    "erf": (torch.erf, (A,)),
    "erfinv": (torch.erfinv, (u(3, 4) * 0.9,)),
    "floor": (torch.floor, (A,)),
    "ceil": (torch.ceil, (A,)),
    "round": (torch.round, (A * 3,)),
    "sign": (torch.sign, (A,)),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.3), (A, B)),
    "addcmul": (lambda a, b: torch.addcmul(a, b, b, value=0.5), (A, B)),
    "addcdiv": (lambda a, b: torch.addcdiv(a, b, b.abs() + 1), (A, B)),
    "to integers": (lambda a: (a * 5).to(torch.int32), (A,)),
    "to booleans": (lambda a: a.bool(), (A,)),
    "through half": (lambda a: a.half().float(), (A,)),
    "mixed": (lambda a, b: a + b.double(), (A, B)),
    "integers plus one": (lambda a: a + 1, (i(9, 6),)),
    "by a mask": (lambda a: a * (a > 0), (A,)),
    "bitwise": (lambda a, b: (a & b) | ~a, (i(9, 6), i(9, 6, seed=1))),
    "complex": (lambda a: torch.view_as_real(torch.view_as_complex(a) * 2), (x(4, 2),)),
    "attention": (
        lambda q, k, v: torch.matmul(F.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.25, -1), v),
        (x(1, 2, 8, 16), x(1, 2, 8, 16, seed=1), x(1, 2, 8, 16, seed=2)),
    ),
}

FAST = (
    "linear", "layer_norm", "conv2d", "cross_entropy", "attention", "index", "scatter_add", "topk", "slice_scatter",
    "pad with a value", "div trunc", "std", "permute", "one_hot",
)  # fmt: skip
"""Some of each kind, for the fast lane."""
