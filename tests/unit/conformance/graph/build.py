"""Lowered graphs written by hand."""

from __future__ import annotations

from typing import Any

import torch

from qwen2_npu.conformance.graph.lowering import Lowered
from qwen2_npu.conformance.graph.shapes import GraphValue, Origin
from qwen2_npu.emulator.ge.proto import Edge, Node


def value(*shape: int, origin: Origin = "activation", dtype: torch.dtype = torch.bfloat16) -> GraphValue:
    """A tensor of a graph, without one."""
    return GraphValue(shape, dtype, origin)


class Graph:
    """Collects nodes; every method returns the edge of what it adds.

    graph = Graph()
    x = graph.data((4, 8))
    y = graph.op("Relu", x)
    """

    def __init__(self, *, batch: int = 1, live: int = 1, layers: int = 1, ranks: int = 1) -> None:
        self.nodes: list[Node] = []
        self.weights: set[int] = set()
        self.on_host: set[int] = set()
        self.about = {"batch": batch, "live": live, "layers": layers, "ranks": ranks}
        self.inputs = 0

    def _add(self, type_: str, inputs: tuple[Edge | None, ...] = (), names: tuple[str, ...] = (), **more: Any) -> Edge:
        name = f"{type_}_{len(self.nodes)}"
        fields: dict[str, Any] = {"references": {}, "attributes": {}, "promised": (None,), "shapes": ((),)}
        self.nodes.append(Node(name, type_, inputs, names, (), **(fields | more)))
        return Edge(name, 0)

    def data(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, *, weight: bool = False) -> Edge:
        if weight:
            self.weights.add(self.inputs)
        return self._data(shape, dtype)

    def host(self, shape: tuple[int, ...]) -> Edge:
        self.on_host.add(self.inputs)
        return self._data(shape, torch.int64)

    def _data(self, shape: tuple[int, ...], dtype: torch.dtype) -> Edge:
        self.inputs += 1
        attributes = {"index": self.inputs - 1}
        return self._add("Data", attributes=attributes, promised=(dtype,), shapes=(shape,))

    def const(self, *numbers: int) -> Edge:
        return self._add("Const", attributes={"value": torch.tensor(numbers)})

    def op(self, type_: str, names: str, *inputs: Edge | None, **attributes: Any) -> Edge:
        """``names``: of the operator's inputs, blank-separated."""
        return self._add(type_, inputs, tuple(names.split()), attributes=attributes)

    def in_place(self, type_: str, names: str, *inputs: Edge | None, **attributes: Any) -> Edge:
        """An operator whose first output is its first input."""
        return self._add(type_, inputs, tuple(names.split()), attributes=attributes, references={0: 0})

    def lowered(self, *outputs: Edge) -> Lowered:
        self._add("NetOutput", outputs)
        return Lowered(
            phase="decode", nodes=self.nodes, weights=frozenset(self.weights),
            on_host=frozenset(self.on_host), **self.about,
        )  # fmt: skip
