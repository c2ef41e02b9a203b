"""What must be true of a lowered graph, step by step of the ladder. Each returns what is wrong, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qwen2_npu.conformance.graph.cost import COLLECTIVES, PRODUCTS
from qwen2_npu.conformance.graph.lowering import Lowered
from qwen2_npu.conformance.graph.shapes import DATA, LENGTHS, WRITES, GraphValue, Operation, cache_inputs, operations
from qwen2_npu.optimizations import Optimizations

Problems = Iterator[str]


@dataclass(frozen=True)
class Graph:
    """A lowered step with what is known of it."""

    lowered: Lowered
    ops: list[Operation]
    optimizations: Optimizations
    vocab: int

    def of_type(self, *types: str) -> list[Operation]:
        return [op for op in self.ops if op.node.type in types]

    @property
    def products(self) -> list[Operation]:
        """Matrix products with a weight."""
        return [op for op in self.ops if op.node.type in PRODUCTS and any(v.origin == "weight" for v in op.given)]

    @property
    def kept_alone(self) -> bool:
        """Whether the last layer computes the kept positions alone."""
        return self.optimizations.last_layer and self.lowered.phase == "prefill"

    @property
    def heads(self) -> list[Operation]:
        """The products with lm_head."""
        return [op for op in self.products if op.outputs[0].shape[-1] == self.vocab]


def kv_in_place(graph: Graph) -> Problems:
    """Every layer writes k and v straight into the caller's cache, and nothing copies a cache."""
    scatters, layers = graph.of_type(*WRITES), graph.lowered.layers
    wanted = {"Scatter": (2 * layers, "one for k and one for v"), "ScatterPaKvCache": (0, "none")}
    if graph.optimizations.kv_scatter and graph.lowered.phase == "decode":
        wanted = {"Scatter": (0, "none"), "ScatterPaKvCache": (layers, "one for k and v")}
    for name, (count, each) in wanted.items():
        if (found := len(graph.of_type(name))) != count:
            yield f"{found} {name} nodes, expected {count}: {each} per layer"
    inputs = cache_inputs(graph.lowered.nodes)
    for op in scatters:
        for target in (op.node.inputs[index] for index in WRITES[op.node.type]):
            if target is None or target.node not in inputs:
                yield f"{op.node.name} writes {target and target.node}, a copy, not an input of the graph"
    for op in graph.of_type("Assign"):
        yield f"{op.node.name} copies a result back into an input: the write was not in place"
    if len(inputs) == 0:
        return
    smallest = min(value.nbytes for op in scatters for value in op.given if value.origin == "cache")
    for op in graph.ops:
        if op.node.type in COPIES and any(v.origin == "cache" and v.nbytes >= smallest for v in op.given):
            yield f"{op.node.name} ({op.node.type}) copies a whole KV cache"


COPIES = frozenset(
    ("TensorMove", "Identity", "ConcatV2", "ConcatD", "Pack", "StridedSliceV2", "Transpose", "Slice", "SplitV")
)
"""Operators that would be a copy of the cache if they read one."""


def no_wide_copies(graph: Graph) -> Problems:
    """No weight and no cache is cast to another dtype."""
    for op in graph.of_type("Cast"):
        if op.given[0].origin in ("weight", "cache") and len(op.given[0].shape) > 1:
            yield f"{op.node.name} casts a whole {op.given[0].origin} {op.given[0].shape} to {op.outputs[0].dtype}"


def head_on_last_token(graph: Graph) -> Problems:
    """lm_head is computed for one token per row."""
    for op in graph.heads:
        rows = op.outputs[0].elements // graph.vocab
        if rows != graph.lowered.batch:
            yield f"{op.node.name} computes logits of {rows} tokens, expected {graph.lowered.batch}: one per row"
    if len(graph.heads) != 1:
        yield f"{len(graph.heads)} products with lm_head, expected 1"


EXPERT_PRODUCTS = 4
"""Of a mixture of experts beside the shared one: two grouped products, the router, and the gate of the shared one."""

ROUTED = {"MoeGatingTopKSoftmax": 1, "MoeInitRoutingV3": 1, "GroupedMatmul": 2, "MoeFinalizeRoutingV2": 1}
"""GE operator -> how many a layer of experts has."""


def grouped_experts(graph: Graph) -> Problems:
    """All experts of a layer are two products, which read the weights as they lie; nothing else reads those."""
    for name, count in ROUTED.items():
        if (found := len(graph.of_type(name))) != count * graph.lowered.sparse:
            yield f"{found} {name}, expected {count} in each of {graph.lowered.sparse} layers with experts"
    data = {node.name for node in graph.lowered.nodes if node.type in DATA}
    for op in graph.ops:
        for place, value in enumerate(op.inputs):
            if value is None or not _is_of_experts(value):
                continue
            edge = op.node.inputs[place]
            if op.node.type != "GroupedMatmul":
                yield f"{op.node.name} ({op.node.type}) reads the weights of the experts {value.shape}"
            elif edge is None or edge.node not in data:
                yield f"{op.node.name} reads {edge and edge.node}, not the experts' weights themselves"


EXPERT_DIMENSIONS = 3
"""Of the weights of all experts together; no other weight has so many."""


def _is_of_experts(value: GraphValue) -> bool:
    return value.origin == "weight" and len(value.shape) == EXPERT_DIMENSIONS


def fused_products(graph: Graph) -> Problems:
    """One product for q, k and v, and one for gate and up, where those steps are on."""
    per_layer = 7 - 2 * graph.optimizations.fused_qkv - graph.optimizations.fused_gate_up
    found, sparse = len(graph.products) - len(graph.heads), graph.lowered.sparse
    # The last layer of a prefill has two products with parts of its weight of q, k and v, which are no weights here.
    split = int(graph.kept_alone and graph.optimizations.fused_qkv)
    if found != per_layer * graph.lowered.layers + EXPERT_PRODUCTS * sparse - split:
        yield (
            f"{found} products with weights in {graph.lowered.layers} layers, expected {per_layer} per layer, "
            f"{EXPERT_PRODUCTS} more in each of {sparse} with experts and {split} fewer in the last: "
            "q, k and v, or gate and up, are not fused as switched on"
        )


MASK_OPERATORS = """
Less LessEqual Greater GreaterEqual LogicalAnd LogicalOr LogicalNot SelectV2 Select MaskedFill Range Triu Tril
"""
MASK_WORK = frozenset(MASK_OPERATORS.split())
ANGLE_WORK = frozenset(["Cos", "Sin"])

EMBEDDING_MASK = {"Less": 1, "GreaterEqual": 1, "LogicalOr": 1, "MaskedFill": 2}
"""Where the embedding table is cut over ranks: which tokens another rank holds, once per step."""

KEPT_MASK = {"Less": 1}
"""With last_layer: what the kept positions of a prompt may not see, once per prefill."""

TABLE_READS = 3
"""The embedding, cos and sin."""


def nothing_repeated_in_layers(graph: Graph) -> Problems:
    """From flash_attention on: cos and sin are read once per step, and no mask is made in the graph."""
    gathers = [
        op for op in graph.of_type("GatherV2", "IndexByTensor") if op.given[0].origin in ("weight", "activation")
    ]
    if len(gathers) != TABLE_READS:
        yield f"{len(gathers)} reads of tables, expected {TABLE_READS} per step (embedding, cos, sin) for all layers"
    allowed = Counter(EMBEDDING_MASK if graph.lowered.ranks > 1 else {})
    allowed.update(KEPT_MASK if graph.kept_alone else {})
    for op in graph.ops:
        if op.node.type in MASK_WORK | ANGLE_WORK:
            allowed[op.node.type] -= 1
            if allowed[op.node.type] < 0:
                yield f"{op.node.name} ({op.node.type}): masks and angles are no work of the graph"


def live_attention(graph: Graph) -> Problems:
    """From ifa_tiling on: incremental attention is told how much of the cache is live."""
    for op in graph.of_type(*LENGTHS):
        if op.live_slots is None:
            yield f"{op.node.name} is given no actual_seq_lengths and attends the whole cache"


def one_rotary_operator(graph: Graph) -> Problems:
    """One operator turns q and k of a layer."""
    turning = graph.of_type("RotaryMul", "ApplyRotaryPosEmb")
    if [op.node.type for op in turning] != ["RotaryMul"] * graph.lowered.layers:
        types = dict(Counter(op.node.type for op in turning))
        yield f"{types} turn q and k, expected one RotaryMul in each of {graph.lowered.layers} layers"


def plain_products(graph: Graph) -> Problems:
    """Products of a decode step have two dimensions."""
    for op in graph.products:
        if op.node.type.startswith("BatchMatMul"):
            yield f"{op.node.name} ({op.node.type}) is a product of {op.given[0].shape}, expected rows alone"


def last_layer_on_kept_positions(graph: Graph) -> Problems:
    """Of the last layer k and v alone are computed for every token, all other products for one per row."""
    switched, lowered = graph.optimizations, graph.lowered
    per_layer = 7 - 2 * switched.fused_qkv - switched.fused_gate_up
    every, one_each = lowered.batch * lowered.live, lowered.batch
    # Of experts the router and the gate of the shared one; grouped products have a row per expert of a token.
    expected = per_layer * (lowered.layers - 1) + (1 if switched.fused_qkv else 2) + 2 * max(lowered.sparse - 1, 0)
    rows = _rows(graph.of_type(*(PRODUCTS - {"GroupedMatmul"})))
    if rows[every] != expected or set(rows) != {every, one_each}:
        yield f"products by rows: {dict(rows)}, expected {expected} of {every} and the others of {one_each}"
    grouped = _rows(graph.of_type("GroupedMatmul"))
    if grouped and (grouped[min(grouped)] != 2 or min(grouped) * every != max(grouped) * one_each):
        yield f"grouped products by rows: {dict(grouped)}, expected 2 of {one_each / every} times the others'"


EIGHT_BIT_PRODUCTS: dict[str | None, str] = {"w8a16": "WeightQuantBatchMatmulV2", "w8a8": "QuantBatchMatmulV3"}


def eight_bit_weights(graph: Graph) -> Problems:
    """With w8a16 or w8a8 every product of the layers, and not the head, reads its weight as 8-bit integers."""
    scheme = graph.optimizations.scheme
    wanted = EIGHT_BIT_PRODUCTS.get(scheme)
    heads = {op.node.name for op in graph.heads}
    for op in graph.of_type(*PRODUCTS):
        weights = [value for value in op.given if value.origin == "weight" and len(value.shape) > 1]
        name, layers = f"{op.node.name} ({op.node.type})", op.node.name not in heads
        if wanted is not None and layers and op.node.type != wanted and weights:
            yield f"{name} multiplies with a weight, expected {wanted}"
        for value in filter(_is_wide, weights):
            if (value.dtype == torch.int8) != (wanted is not None and layers):
                yield f"{name} reads a weight {value.shape} of {value.dtype} with {scheme or 'ordinary weights'}"
        if op.node.type == "QuantBatchMatmulV3" and op.given[0].dtype != torch.int8:
            yield f"{name} is given activations of {op.given[0].dtype}"


def _is_wide(value: GraphValue) -> bool:
    """A weight, not the scales of one."""
    return min(value.shape) > 1


QUANTISATIONS = ("DynamicQuant", "AddRmsNormDynamicQuant", "DequantSwigluQuant")


def activations_quantised_once(graph: Graph) -> Problems:
    """With w8a8: once for q, k and v, once for o_proj, once for gate and up, and once for down_proj."""
    found, expected = len(graph.of_type(*QUANTISATIONS)), 4 * graph.lowered.layers
    if found != expected:
        yield f"activations are quantised {found} times in {graph.lowered.layers} layers, expected {expected}"
    if graph.optimizations.swiglu and (apart := graph.of_type("SwiGlu")):
        yield f"{len(apart)} SwiGlu, expected none: DequantSwigluQuant does its work"
    fused = graph.optimizations.add_rms_norm and not graph.optimizations.separate_norm_quant
    norms = len(graph.of_type("AddRmsNormDynamicQuant"))
    if norms != fused * (2 * graph.lowered.layers - 1):
        yield f"{norms} AddRmsNormDynamicQuant in {graph.lowered.layers} layers: all norms but the first and the last"


def _rows(ops: list[Operation]) -> Counter[int]:
    return Counter(op.outputs[0].elements // op.outputs[0].shape[-1] for op in ops)


@dataclass(frozen=True)
class Invariant:
    """``since``: the switch that it begins with; None for all. ``phases``: where it applies."""

    check: Callable[[Graph], Problems]
    since: str | None = None
    phases: tuple[str, ...] = ("prefill", "decode")

    def applies(self, graph: Graph) -> bool:
        switched = self.since is None or getattr(graph.optimizations, self.since)
        return switched and graph.lowered.phase in self.phases


def collectives(graph: Graph) -> Problems:
    """Two sums over the ranks per layer and one after the embedding, one gather of the logits; one rank has none.

    The sum after the experts is one of its own: no product stands before it.
    """
    several, layers, sparse = graph.lowered.ranks > 1, graph.lowered.layers, graph.lowered.sparse
    fused = several and graph.optimizations.mm_all_reduce and graph.lowered.phase == "prefill"
    # The last layer of a prefill with last_layer has few rows: its sums are those of a decode step.
    alone = (1 if sparse else 2) * graph.kept_alone
    expected = {
        "MatmulAllReduce": fused * (2 * layers - sparse - alone),
        "HcomAllReduce": several * (1 + sparse + alone if fused else 2 * layers + 1),
        "HcomAllGather": int(several),
    }
    for name, count in expected.items():
        if (found := len(graph.of_type(name))) != count:
            yield f"{found} {name}, expected {count} for {graph.lowered.ranks} ranks and {layers} layers"
    for op in graph.of_type(*(set(COLLECTIVES) - set(expected))):
        yield f"{op.node.name} ({op.node.type}): a collective that the model does not need"


INVARIANTS: tuple[Invariant, ...] = (
    Invariant(collectives),
    Invariant(kv_in_place, since="flash_attention"),
    Invariant(no_wide_copies),
    Invariant(head_on_last_token, since="last_token_logits"),
    Invariant(fused_products),
    Invariant(last_layer_on_kept_positions, since="last_layer", phases=("prefill",)),
    Invariant(grouped_experts),
    Invariant(eight_bit_weights),
    Invariant(activations_quantised_once, since="w8a8"),
    Invariant(nothing_repeated_in_layers, since="flash_attention"),
    Invariant(live_attention, since="ifa_tiling", phases=("decode",)),
    Invariant(one_rotary_operator, since="one_rotary", phases=("decode",)),
    Invariant(plain_products, since="kv_scatter", phases=("decode",)),
)


def static_inputs(lowered: Lowered) -> Problems:
    """Every tensor on the device has a fixed shape: only then can its tiling be computed ahead."""
    for node in lowered.nodes:
        if node.type in DATA and node.attributes["index"] not in lowered.on_host and min(node.shapes[0], default=0) < 0:
            yield f"input {node.name} has the shape {node.shapes[0]}, where -1 may change: mark_static is missing"


def input_problems(lowered: Lowered) -> list[str]:
    """What is wrong with the inputs; nothing else can be said of a graph without shapes."""
    return [f"{static_inputs.__name__}: {problem}" for problem in static_inputs(lowered)]


def problems(lowered: Lowered, optimizations: Optimizations, vocab: int) -> list[str]:
    """Everything that is wrong with the graph of a step; each line names the invariant and the node."""
    dynamic = input_problems(lowered)
    return dynamic or graph_problems(Graph(lowered, operations(lowered), optimizations, vocab))


def graph_problems(graph: Graph) -> list[str]:
    """What the invariants that apply to the graph say of it."""
    return [
        f"{invariant.check.__name__}: {problem}"
        for invariant in INVARIANTS
        if invariant.applies(graph)
        for problem in invariant.check(graph)
    ]
