"""Shape, dtype and origin of every value in a lowered graph.

torchair leaves shapes to GE's own inference, so a lowered graph has none beyond its inputs. Here the emulator's
operators run on meta tensors, which have a shape and no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from qwen2_npu.conformance.graph.lowering import Lowered
from qwen2_npu.emulator.ge import operators
from qwen2_npu.emulator.ge.order import ordered
from qwen2_npu.emulator.ge.proto import Edge, Node

Origin = Literal["weight", "cache", "constant", "activation"]

DATA = frozenset({"Data", "RefData"})

CONSTANTS = frozenset({"Const"})

STRUCTURE = DATA | CONSTANTS | {"ConstPlaceHolder", "NetOutput"}
"""Nodes that are not operators."""

VIEWS = frozenset({"Reshape", "Unsqueeze", "Squeeze", "ExpandDims"})
"""Operators that change a shape and move nothing."""


LENGTHS = {"IncreFlashAttention": "actual_seq_lengths", "FusedInferAttentionScore": "actual_seq_lengths_kv"}
"""Operator of incremental attention -> its input of the live lengths."""


@dataclass(frozen=True)
class GraphValue:
    """A tensor of the graph. ``origin``: what it is, or is a view of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: Origin

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Operation:
    """One operator with its values; None where an optional input is not fed.

    Attributes:
        live_slots: for incremental attention that is given live lengths, their sum over the rows.
        ranks: for a collective, how many cards take part.
    """

    node: Node
    inputs: tuple[GraphValue | None, ...]
    outputs: tuple[GraphValue, ...]
    live_slots: int | None = None
    ranks: int = 1

    @property
    def given(self) -> list[GraphValue]:
        """The inputs that are fed."""
        return [value for value in self.inputs if value is not None]

    @property
    def is_view(self) -> bool:
        """Whether it costs nothing: a change of shape, or the transpose of a weight, which its product folds in."""
        return self.node.type in VIEWS or (self.node.type == "Transpose" and self.inputs[0].origin == "weight")  # type: ignore[union-attr]


def operations(lowered: Lowered) -> list[Operation]:
    """The operators of the graph in an order in which they can run, less those that only compute constants.

    Raises:
        UnsupportedGraphError: an operator that the emulator's table lacks, by name.
    """
    nodes = ordered(lowered.nodes)
    caches = cache_inputs(nodes)
    constants: dict[Edge, torch.Tensor] = {}
    tensors: dict[Edge, torch.Tensor] = {}
    values: dict[Edge, GraphValue] = {}
    result: list[Operation] = []
    for node in nodes:
        if node.type in STRUCTURE:
            if node.type == "NetOutput":
                continue
            edge = Edge(node.name, 0)
            if node.type in CONSTANTS:
                constants[edge] = node.attributes["value"]
                tensors[edge], origin = constants[edge].to("meta"), "constant"
            else:
                tensors[edge], origin = _data(node, lowered, node.name in caches)
            values[edge] = GraphValue(tuple(tensors[edge].shape), tensors[edge].dtype, origin)  # type: ignore[arg-type]
            continue
        kernel = operators.find(node).bind(node, constants)
        if all(edge is None or edge in constants for edge in node.inputs):  # GE folds it when it compiles
            folded = _outputs(kernel([None if edge is None else constants[edge] for edge in node.inputs]))
            for index, tensor in enumerate(folded):
                edge = Edge(node.name, index)
                constants[edge], tensors[edge] = tensor, tensor.to("meta")
                values[edge] = GraphValue(tuple(tensor.shape), tensor.dtype, "constant")
            continue
        outputs = _outputs(kernel([None if edge is None else tensors[edge] for edge in node.inputs]))
        inputs = tuple(None if edge is None else values[edge] for edge in node.inputs)
        origin = _origin_of_result(node, inputs)
        described = []
        for index, tensor in enumerate(outputs):
            edge = Edge(node.name, index)
            tensors[edge], values[edge] = tensor, GraphValue(tuple(tensor.shape), tensor.dtype, origin)
            described.append(values[edge])
        ranks = node.attributes.get("rank_size", lowered.ranks)
        result.append(Operation(node, inputs, tuple(described), _live_slots(node, tensors, lowered.batch), ranks))
    return result


def _outputs(made: Any) -> tuple[torch.Tensor, ...]:
    return tuple(made) if isinstance(made, tuple | list) else (made,)


WRITES = {"Scatter": (0,), "ScatterPaKvCache": (1, 4)}
"""GE operator -> its inputs that it writes in place."""


def cache_inputs(nodes: list[Node]) -> set[str]:
    """Names of the Data nodes that are written: the KV cache."""
    data = {node.name for node in nodes if node.type in DATA}
    targets = [node.inputs[index] for node in nodes for index in WRITES.get(node.type, ())]
    return {edge.node for edge in targets if edge is not None and edge.node in data}


def _data(node: Node, lowered: Lowered, is_cache: bool) -> tuple[torch.Tensor, Origin]:
    shape, dtype, index = node.shapes[0], node.promised[0], node.attributes["index"]
    if index in lowered.on_host:
        return torch.full(shape, lowered.live, dtype=dtype or torch.int64), "constant"
    origin: Origin = "weight" if index in lowered.weights else "cache" if is_cache else "activation"
    return torch.empty(shape, dtype=dtype, device="meta"), origin


def _live_slots(node: Node, tensors: dict[Edge, torch.Tensor], batch: int) -> int | None:
    """The lengths an incremental attention is given, summed; one length serves all rows."""
    name = LENGTHS.get(node.type)
    if name not in node.input_names:
        return None
    edge = node.inputs[node.input_names.index(name)]
    if edge is None:
        return None
    lengths = tensors[edge].tolist()
    return sum(lengths) * (batch if len(lengths) == 1 else 1)


def _origin_of_result(node: Node, inputs: tuple[GraphValue | None, ...]) -> Origin:
    first = inputs[0] if inputs else None
    if node.type in WRITES:
        written = {value.origin for index in WRITES[node.type] if (value := inputs[index]) is not None}
        return "cache" if written == {"cache"} else "activation"
    if first is not None and node.type in VIEWS:
        return first.origin
    if first is not None and node.type == "Transpose" and first.origin == "weight":
        return "weight"
    return "activation"
