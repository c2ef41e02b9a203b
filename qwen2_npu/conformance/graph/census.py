"""What a lowered graph is made of, in numbers that a baseline can hold.

The decoder's layers repeat, so a graph is described by what stands once (``outside``) and by one ``layer``: the
difference of a four-layer and a two-layer graph. ``tests/graph`` proves on full-size graphs that this adds up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen2_npu.conformance.graph.cost import Cost, cost_of
from qwen2_npu.conformance.graph.lowering import Lowered
from qwen2_npu.conformance.graph.memory import peak_activation_bytes
from qwen2_npu.conformance.graph.shapes import operations

FEW, MORE = 2, 4
"""Layers of the two graphs whose difference is two layers."""


@dataclass(frozen=True)
class Census:
    """Of a whole graph, or of the part of it that belongs to one layer.

    Attributes:
        nodes: all GE nodes, constants and inputs included.
        costs: GE operator -> the cost of all its nodes together; ``launches`` is their number.
        views: GE operator -> how many move nothing.
    """

    nodes: int
    costs: Mapping[str, Cost]
    views: Mapping[str, int]

    @property
    def cost(self) -> Cost:
        """Of everything."""
        return sum(self.costs.values(), Cost())

    @property
    def operators(self) -> dict[str, int]:
        """GE operator -> how many launch a kernel."""
        return {name: cost.launches for name, cost in self.costs.items()}

    def minus(self, other: Census, times: int = 1) -> Census:
        """This less ``times`` the other.

        Raises:
            ValueError: the other has more of something.
        """
        return self._combine(other, -times)

    def plus(self, other: Census, times: int = 1) -> Census:
        """This and ``times`` the other.

        Raises:
            ValueError: this has negative numbers, and the other does not make up for them.
        """
        return self._combine(other, times)

    def without(self, other: Census, times: int) -> Census:
        """This less ``times`` the other, where it may have fewer of something: the number is negative then.

        The norm of the first layer has no residual to add, and so is another operator than that of all others.
        """
        return self._combine(other, -times, signed=True)

    def _combine(self, other: Census, times: int, *, signed: bool = False) -> Census:
        def number(name: str, mine: int, theirs: int) -> int:
            result = mine + times * theirs
            if result < 0 and not signed:
                raise ValueError(f"{name}: cannot take {theirs} {-times} times from {mine}")
            return result

        costs = {
            name: self.costs.get(name, Cost()).combined(other.costs.get(name, Cost()), partial(number, name))
            for name in sorted({*self.costs, *other.costs})
        }
        views = {
            name: number(name, self.views.get(name, 0), other.views.get(name, 0))
            for name in sorted({*self.views, *other.views})
        }
        return Census(
            nodes=number("nodes", self.nodes, other.nodes),
            costs={name: cost for name, cost in costs.items() if cost != Cost()},
            views={name: count for name, count in views.items() if count},
        )

    def halved(self) -> Census:
        """One of two equal parts.

        Raises:
            ValueError: a number is odd: the parts are not equal.
        """

        def half(name: str, count: int, _: int = 0) -> int:
            if count % 2:
                raise ValueError(f"{name}: {count} is not twice anything; the layers differ")
            return count // 2

        return Census(
            nodes=half("nodes", self.nodes),
            costs={name: cost.combined(cost, partial(half, name)) for name, cost in self.costs.items()},
            views={name: half(name, count) for name, count in self.views.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """As a baseline holds it."""
        return {
            "nodes": self.nodes,
            "costs": {name: cost.to_json() for name, cost in sorted(self.costs.items())},
            "views": dict(sorted(self.views.items())),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Census:
        """The reverse of :meth:`to_json`."""
        costs = {name: Cost(**cost) for name, cost in data["costs"].items()}
        return cls(data["nodes"], costs, data["views"])


@dataclass(frozen=True)
class LayeredCensus:
    """A graph of any number of layers.

    Attributes:
        peak_activation_bytes: of the two-layer graph; more layers reuse the same memory.
        unlike: layers that are not as ``layer`` is, counted in ``outside``.
    """

    outside: Census
    layer: Census
    peak_activation_bytes: int
    unlike: int = 0

    def of(self, layers: int) -> Census:
        """The graph with so many layers."""
        return self.outside.plus(self.layer, layers - self.unlike)

    def to_json(self) -> dict[str, Any]:
        """As a baseline holds it."""
        return {
            "outside": self.outside.to_json(),
            "layer": self.layer.to_json(),
            "peak_activation_bytes": self.peak_activation_bytes,
            **({"unlike": self.unlike} if self.unlike else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayeredCensus:
        """The reverse of :meth:`to_json`."""
        outside, layer = Census.from_json(data["outside"]), Census.from_json(data["layer"])
        return cls(outside, layer, data["peak_activation_bytes"], data.get("unlike", 0))


def take(lowered: Lowered) -> Census:
    """The census of one graph."""
    costs: dict[str, Cost] = {}
    views: Counter[str] = Counter()
    for op in operations(lowered):
        if op.is_view:
            views[op.node.type] += 1
        else:
            costs[op.node.type] = costs.get(op.node.type, Cost()) + cost_of(op)
    return Census(len(lowered.nodes), costs, dict(views))


def of_layers(few: Lowered, more: Lowered) -> LayeredCensus:
    """From a two-layer and a four-layer graph of the same step.

    Raises:
        ValueError: the layers do not repeat.
    """
    smaller = take(few)
    layer = take(more).minus(smaller).halved()
    smaller.minus(layer, FEW - 1 - few.unlike)  # raises where even one layer is not in it
    outside = smaller.without(layer, FEW - few.unlike)
    return LayeredCensus(outside, layer, peak_activation_bytes(few), few.unlike)
