"""Compiled on a CPU: products of a few rows with a weight, as loops that read the weight once.

A decode step multiplies one row per sequence with every weight. BLAS libraries handle one row at memory speed at best
and fall far behind at two or four, or in bf16 without hardware for it. Written as ``y[m, n] = Σ_k w[n, k]·x[m, k]``
with the rows unrolled, inductor fuses the sums of all rows into one vectorised loop over the weight: each element is
read, and converted to float32, once. Nothing is repacked, so no second copy of a weight exists.

Elsewhere the graph takes what the eager model takes: PyTorch's own product, or one of :mod:`qwen2_npu.ops.linear` that
is faster.

:class:`SmallBatchProducts` is an inductor post-grad pass: it changes the compiled graph, not the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._inductor import inductor_prims
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from qwen2_npu.ops import linear, quantization

MAX_ROWS = 8
"""Rows up to which the loop is bound by reading the weight rather than by arithmetic on 16 vector registers."""
MAX_ROWS_FAST_BF16 = 4
"""The same in bf16 where the processor multiplies bf16 itself, and BLAS with it; and for weights of 8-bit integers."""
L1_BYTES = 32 * 1024
"""The rows are read again for every output: in float32 they should stay in the first-level cache."""
MAX_ROWS_BEYOND_L1 = 3
"""Rows up to which the loop is faster than the eager model in float32 all the same."""

aten = torch.ops.aten


class SmallBatchProducts(CustomGraphPass):
    """:func:`rewrite` as inductor takes it; the hash lets compiled graphs be cached."""

    def __call__(self, graph: fx.Graph) -> None:
        rewrite(graph)

    def uuid(self) -> bytes:
        return get_hash_for_files(
            (__file__, linear.__file__, quantization.__file__), extra=str(torch.get_num_threads())
        )


def rewrite(graph: fx.Graph) -> None:
    """Replace ``mm(x, wᵀ)`` and ``addmm(b, x, wᵀ)`` of few rows on the CPU, in place: by loops up to
    :data:`MAX_ROWS`, by the eager model's product where that is not PyTorch's own.
    """
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            *bias, x, transposed = node.args
            weight = _weight_of(transposed)
            if weight is None or node.kwargs:
                continue
            build = _replacement(x.meta["val"], weight.meta["val"])
            if build is None:
                continue
            with graph.inserting_before(node):
                replacement = build(graph, x, weight, bias[0] if bias else None)
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=quantization.IN_GRAPHS):
        x, transposed, scale, bias = node.args
        weight = _weight_of(transposed)
        rows = x.meta["val"].shape[0]
        if weight is None or not isinstance(rows, int) or x.meta["val"].device.type != "cpu":
            continue
        if rows > _loop_rows(weight.meta["val"]):
            continue
        with graph.inserting_before(node):
            replacement = _unrolled(graph, x, weight, bias, scale)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _weight_of(node: fx.Node) -> fx.Node | None:
    """``w`` (N, K) where ``node`` is its transpose."""
    swapped = {aten.permute.default: ([1, 0],), aten.transpose.int: (-2, -1)}.get(node.target)  # type: ignore[call-overload]
    is_transpose = node.target is aten.t.default or (swapped is not None and tuple(node.args[1:]) == swapped)
    weight = node.args[0] if is_transpose else None
    return weight if isinstance(weight, fx.Node) and weight.meta["val"].is_contiguous() else None


Builder = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node | None], fx.Node]


def _replacement(x: torch.Tensor, weight: torch.Tensor) -> Builder | None:
    """What to put in place of x (M, K) times the transpose of weight (N, K), if anything."""
    rows = x.shape[0]
    if not isinstance(rows, int) or x.device.type != "cpu" or not x.is_floating_point():
        return None
    if rows <= _loop_rows(weight):
        return _unrolled
    return _as_eager if linear.faster_product(rows, weight) else None


def _loop_rows(weight: torch.Tensor) -> int:
    """Up to how many rows the loop over weight (N, K) is faster than the eager model: see docs/performance.md."""
    in_cache = L1_BYTES // (4 * weight.shape[1])
    if weight.dtype == torch.int8 or (weight.dtype == torch.bfloat16 and _multiplies_bf16()):
        return min(MAX_ROWS_FAST_BF16, in_cache // 2)  # measured; the weight streams through that cache too
    if weight.dtype == torch.float32:
        return min(MAX_ROWS, max(MAX_ROWS_BEYOND_L1, in_cache))
    return MAX_ROWS


def _multiplies_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Add a call to ``graph``, with the fake value of its result."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda argument: argument.meta["val"]))
    return node


def _unrolled(
    graph: fx.Graph, x: fx.Node, weight: fx.Node, bias: fx.Node | None, scale: fx.Node | None = None
) -> fx.Node:
    call = partial(_call, graph)
    dtype = x.meta["val"].dtype
    widen = torch.ops.prims.convert_element_type.default
    wide_weight, wide_x = call(widen, weight, torch.float32), call(widen, x, torch.float32)
    # A buffer of its own: else what computes x (a norm, a SiLU) is inlined, and done again for every output.
    wide_x = call(inductor_prims.force_stride_order, wide_x, [x.meta["val"].shape[1], 1])
    sums = []
    for row in range(x.meta["val"].shape[0]):
        terms = call(aten.mul.Tensor, wide_weight, call(aten.select.int, wide_x, 0, row))
        sums.append(call(aten.unsqueeze.default, call(aten.sum.dim_IntList, terms, [-1]), 0))
    total = call(aten.cat.default, sums, 0) if len(sums) > 1 else sums[0]
    if scale is not None:
        total = call(aten.mul.Tensor, total, call(widen, scale, torch.float32))
    if bias is not None:
        total = call(aten.add.Tensor, total, call(widen, bias, torch.float32))
    return call(widen, total, dtype)


def _as_eager(graph: fx.Graph, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    return _call(graph, linear.IN_GRAPHS, x, weight, bias)
