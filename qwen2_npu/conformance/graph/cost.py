"""What a lowered graph costs: FLOPs, bytes moved, bytes sent to other cards, kernel launches.

Counts, not times: from the shapes and dtypes of the real lowered graph, so they are the same on every machine. A
multiply-add counts as two FLOPs. Every operator reads its inputs and writes its outputs once; what differs is in
:data:`RULES`: products, attention (charged the live length it is given, or the whole cache where it is given none),
writes in place and gathers (charged what they touch), and collectives, which also send. A grouped product is charged
the weights of as many groups as it has rows, or of all: at most so many have one. How many it can be, and how many are
to be expected, :func:`experts_read` says.

Bytes that each of n cards sends, by the ring algorithms (Thakur, Rabenseifner, Gropp: Optimization of Collective
Communication Operations in MPICH, 2005; the "bus bandwidth" factors of NCCL's tests): 2·(n - 1)/n of the tensor for an
all-reduce, which is a reduce-scatter and an all-gather of (n - 1)/n each; the whole tensor for a broadcast, which every
card but the last passes on. Additions on the way are not counted: they are few beside the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch

from qwen2_npu.conformance.graph.lowering import Lowered
from qwen2_npu.conformance.graph.shapes import GraphValue, Operation, operations


@dataclass(frozen=True)
class Cost:
    """Of an operator, or of a graph as their sum.

    Attributes:
        weight_bytes, cache_bytes, activation_bytes: moved between memory and cores, read and written.
        launches: kernels.
        link_bytes: sent to other cards.
    """

    flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0
    launches: int = 0
    link_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return self.combined(other, int.__add__)

    def combined(self, other: Cost, combine: Callable[[int, int], int]) -> Cost:
        """``combine`` applied to every number of the two."""
        return Cost(*(combine(getattr(self, field.name), getattr(other, field.name)) for field in fields(Cost)))

    def to_json(self) -> dict[str, int]:
        """As a baseline holds it: graphs of one card have no ``link_bytes``."""
        return {name: number for name, number in asdict(self).items() if number or name != "link_bytes"}

    @property
    def nbytes(self) -> int:
        """All bytes moved between memory and cores."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


def moved(values: Iterable[GraphValue]) -> Cost:
    """The cost of reading or writing ``values`` once."""
    total = {"weight": 0, "cache": 0, "activation": 0, "constant": 0}
    for value in values:
        total[value.origin] += value.nbytes
    return Cost(
        weight_bytes=total["weight"],
        cache_bytes=total["cache"],
        activation_bytes=total["activation"] + total["constant"],
    )


class ExpertsRead(NamedTuple):
    """How many experts of one layer have a token, and so their weights read."""

    least: int
    expected: float
    most: int


def experts_read(experts: int, per_token: int, tokens: int) -> ExpertsRead:
    """Of ``experts``, when each of ``tokens`` goes to ``per_token`` of them.

    ``expected`` is E·(1 - (1 - k/E)^T): every set of k experts is as likely as any other, and tokens choose on their
    own. A trained router may prefer some, and tokens of one text choose alike: then it is fewer.
    """
    expected = experts * (1 - (1 - per_token / experts) ** tokens)
    return ExpertsRead(per_token, expected, min(experts, per_token * tokens))


# ---- rules ----------------------------------------------------------------------------------------------------------
def _elementwise(op: Operation) -> Cost:
    return Cost(flops=sum(value.elements for value in op.outputs)) + moved([*op.given, *op.outputs])


def _quantisation(op: Operation) -> Cost:
    """As other element-wise operators; a scale is computed of a row that is there already."""
    values = [value for value in op.outputs if len(value.shape) == len(op.given[0].shape)]
    return Cost(flops=sum(value.elements for value in values)) + moved([*op.given, *op.outputs])


def _movement(op: Operation) -> Cost:
    return moved([*op.given, *op.outputs])


def _product(op: Operation) -> Cost:
    out, inner = op.outputs[0], _inner_size(op)
    return Cost(flops=2 * out.elements * inner) + moved([*op.given, *op.outputs])


def _inner_size(op: Operation) -> int:
    first = op.given[0]
    transposed = op.node.attributes.get("transpose_x1", op.node.attributes.get("adj_x1", False))
    return first.shape[-2] if transposed else first.shape[-1]


def _grouped_product(op: Operation) -> Cost:
    named = list(zip(op.node.input_names, op.inputs, strict=True))
    rows, weights = (
        [value for name, value in named if value is not None and name.rstrip("0123456789") == wanted]
        for wanted in ("x", "weight")
    )
    rest = [value for value in op.given if value not in rows and value not in weights]
    flops = sum(2 * x.elements * weights[min(i, len(weights) - 1)].shape[-1] for i, x in enumerate(rows))
    if len(weights) == 1 and len(weights[0].shape) == 3:
        groups, *matrix = weights[0].shape
        weights = [GraphValue((min(groups, rows[0].shape[0]), *matrix), weights[0].dtype, weights[0].origin)]
    return Cost(flops=flops) + moved([*rows, *weights, *rest, *op.outputs])


def _finalize_routing(op: Operation) -> Cost:
    return Cost(flops=2 * op.given[0].elements) + moved([*op.given, *op.outputs])


def _all_reduce(op: Operation) -> Cost:
    return _movement(op) + _sent(2 * (op.ranks - 1) * _nbytes(op.outputs), op.ranks)


def _product_and_all_reduce(op: Operation) -> Cost:
    return _product(op) + _sent(2 * (op.ranks - 1) * _nbytes(op.outputs), op.ranks)


def _all_gather(op: Operation) -> Cost:
    return _movement(op) + _sent((op.ranks - 1) * _nbytes(op.outputs), op.ranks)


def _reduce_scatter(op: Operation) -> Cost:
    return _movement(op) + _sent((op.ranks - 1) * _nbytes(op.given), op.ranks)


def _broadcast(op: Operation) -> Cost:
    return _movement(op) + _sent(_nbytes(op.outputs) if op.ranks > 1 else 0)


def _sent(nbytes: int, parts: int = 1) -> Cost:
    """``nbytes / parts`` to other cards, rounded up: a tensor of fewer elements than cards is sent all the same."""
    return Cost(link_bytes=-(-nbytes // parts))


def _nbytes(values: Iterable[GraphValue]) -> int:
    return sum(value.nbytes for value in values)


def _gather(op: Operation) -> Cost:
    table, out = op.given[0], op.outputs[0]
    rows = GraphValue(out.shape, table.dtype, table.origin)
    return moved([rows, *op.given[1:], out])


def _scatter(op: Operation) -> Cost:
    cache, _, updates = op.given
    return moved([*op.given[1:], GraphValue(updates.shape, updates.dtype, cache.origin)])


def _paged_scatter(op: Operation) -> Cost:
    key, key_cache, slots, value, value_cache = op.given[:5]
    written = [GraphValue(new.shape, new.dtype, old.origin) for new, old in ((key, key_cache), (value, value_cache))]
    return moved([key, value, slots, *written])


def _incremental_attention(op: Operation) -> Cost:
    """q·k and p·v over the live slots: 4·N·D FLOPs per slot; k and v of those slots are read."""
    query, key = op.given[:2]
    batch, slots, kv_heads, size = key.shape
    live = batch * slots if op.live_slots is None else op.live_slots
    kv = GraphValue((live, kv_heads, size), key.dtype, key.origin)
    heads, head_dim = query.shape[-2:]
    rest = [v for v in op.given[3:] if v.origin != "constant"]
    return Cost(flops=4 * heads * head_dim * live) + moved([query, kv, kv, *rest, *op.outputs])


def _prompt_attention(op: Operation) -> Cost:
    query, key = op.given[:2]
    batch, tokens, heads, head_dim = query.shape
    pairs = tokens * key.shape[1]
    rest = [_seen(value, pairs) for value in op.given[2:]]
    if op.node.attributes.get("sparse_mode") in CAUSAL or op.node.attributes.get("next_tokens") == 0:
        pairs = tokens * (tokens + 1) // 2
    return Cost(flops=4 * batch * heads * head_dim * pairs) + moved([query, key, *rest, *op.outputs])


def _infer_attention(op: Operation) -> Cost:
    """One operator for both: of one token per row against the cache, or of a prompt."""
    return (_incremental_attention if op.given[0].shape[1] == 1 else _prompt_attention)(op)


def _seen(value: GraphValue, pairs: int) -> GraphValue:
    """Of a mask larger than the (Sq, Skv) it stands for, as the compressed one is for short prompts, that much."""
    if value.dtype == torch.bool and value.elements > pairs:
        return GraphValue((pairs,), value.dtype, value.origin)
    return value


CAUSAL = (2, 3)
"""``sparse_mode`` values that compute nothing above the diagonal."""

DATA_MOVES = """
TensorMove Identity Transpose SplitV Split SplitD ConcatV2 ConcatD Pack BroadcastTo Expand Fill Slice StridedSliceV2
Cast ZerosLike Assign Tile Pad PadV3 MoeInitRoutingV3
"""
MOVEMENT = frozenset(DATA_MOVES.split())
"""Operators that only move data."""

PRODUCTS = frozenset(
    [
        *("MatMul", "MatMulV2", "MatMulV3", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"),
        *("MatmulAllReduce", "GroupedMatmul"),
        *("WeightQuantBatchMatmulV2", "QuantBatchMatmulV3"),
    ]
)

INTEGER_PRODUCTS = frozenset(["QuantBatchMatmulV3"])
"""Those of PRODUCTS that multiply 8-bit integers with 8-bit integers."""

COLLECTIVES = frozenset(["MatmulAllReduce", "HcomAllReduce", "HcomAllGather", "HcomReduceScatter", "HcomBroadcast"])

ATTENTION = frozenset(["IncreFlashAttention", "PromptFlashAttention", "FusedInferAttentionScore"])

GATHERS = frozenset(["GatherV2", "IndexByTensor", "GatherElements"])

RULES: dict[str, Callable[[Operation], Cost]] = {
    **dict.fromkeys(MOVEMENT, _movement),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(GATHERS, _gather),
    "GroupedMatmul": _grouped_product,
    "MoeFinalizeRouting": _finalize_routing,
    "MoeFinalizeRoutingV2": _finalize_routing,
    "MatmulAllReduce": _product_and_all_reduce,
    "HcomAllReduce": _all_reduce,
    "HcomAllGather": _all_gather,
    "HcomReduceScatter": _reduce_scatter,
    "HcomBroadcast": _broadcast,
    "Scatter": _scatter,
    "ScatterPaKvCache": _paged_scatter,
    "IncreFlashAttention": _incremental_attention,
    "PromptFlashAttention": _prompt_attention,
    "FusedInferAttentionScore": _infer_attention,
    "AddRmsNormDynamicQuant": _quantisation,
    "DynamicQuant": _quantisation,
    "DequantSwigluQuant": _quantisation,
}
"""GE operator -> its cost; all others are element-wise."""


def cost_of(op: Operation) -> Cost:
    """The cost of one operator; nothing for a view."""
    if op.is_view:
        return Cost()
    return RULES.get(op.node.type, _elementwise)(op) + Cost(launches=1)


def total(ops: Iterable[Operation]) -> Cost:
    """Their sum."""
    result = Cost()
    for op in ops:
        result += cost_of(op)
    return result


def graph_cost(lowered: Lowered) -> Cost:
    """The cost of one step."""
    return total(operations(lowered))
