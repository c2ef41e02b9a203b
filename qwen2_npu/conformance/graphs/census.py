"""What a lowered graph is made of, in numbers that a baseline can hold.

The decoder's layers repeat, so a graph is described by what stands once (``outside``) and by one ``layer``: the
difference of a four-layer and a two-layer graph. ``tests/graph`` proves on full-size graphs that this adds up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qwen2_npu.conformance.graphs.cost import Cost, cost_of, total
from qwen2_npu.conformance.graphs.lowering import Lowered, Phase, lower
from qwen2_npu.conformance.graphs.memory import peak_activation_bytes
from qwen2_npu.conformance.graphs.shapes import Operation, operations
from qwen2_npu.conformance.sizes import Size
from qwen2_npu.optimizations import Optimizations

FEW, MORE = 2, 4
"""Layers of the two graphs whose difference is two layers."""


@dataclass(frozen=True)
class Census:
    """Of a whole graph, or of the part of it that belongs to one layer.

    Attributes:
        nodes: all GE nodes, constants and inputs included.
        operators: GE operator -> how many launch a kernel.
        views: GE operator -> how many move nothing.
    """

    nodes: int
    operators: Mapping[str, int]
    views: Mapping[str, int]
    cost: Cost

    def minus(self, other: Census, times: int = 1) -> Census:
        """This less ``times`` the other.

        Raises:
            ValueError: the other has more of something.
        """
        return self._combine(other, -times)

    def plus(self, other: Census, times: int = 1) -> Census:
        """This and ``times`` the other."""
        return self._combine(other, times)

    def _combine(self, other: Census, times: int) -> Census:
        def counts(mine: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, int]:
            both = {name: mine.get(name, 0) + times * theirs.get(name, 0) for name in sorted({*mine, *theirs})}
            if min(both.values(), default=0) < 0:
                raise ValueError(f"cannot take {dict(theirs)} {-times} times from {dict(mine)}")
            return {name: count for name, count in both.items() if count}

        values = {name: mine + times * getattr(other.cost, name) for name, mine in asdict(self.cost).items()}
        return Census(
            nodes=self.nodes + times * other.nodes,
            operators=counts(self.operators, other.operators),
            views=counts(self.views, other.views),
            cost=Cost(**values),
        )

    def halved(self) -> Census:
        """One of two equal parts.

        Raises:
            ValueError: a count is odd: the parts are not equal.
        """

        def half(name: str, count: int) -> int:
            if count % 2:
                raise ValueError(f"{name}: {count} is not twice anything; the layers differ")
            return count // 2

        return Census(
            nodes=half("nodes", self.nodes),
            operators={name: half(name, count) for name, count in self.operators.items()},
            views={name: half(name, count) for name, count in self.views.items()},
            cost=Cost(**{name: half(name, value) for name, value in asdict(self.cost).items()}),
        )

    def to_json(self) -> dict[str, Any]:
        """As a baseline holds it."""
        return {
            "nodes": self.nodes,
            "operators": dict(sorted(self.operators.items())),
            "views": dict(sorted(self.views.items())),
            **asdict(self.cost),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Census:
        """The reverse of :meth:`to_json`."""
        rest = dict(data)
        return cls(rest.pop("nodes"), rest.pop("operators"), rest.pop("views"), Cost(**rest))


@dataclass(frozen=True)
class LayeredCensus:
    """A graph of any number of layers.

    Attributes:
        peak_activation_bytes: of the two-layer graph; more layers reuse the same memory.
    """

    outside: Census
    layer: Census
    peak_activation_bytes: int

    def of(self, layers: int) -> Census:
        """The graph with so many layers."""
        return self.outside.plus(self.layer, layers)

    def to_json(self) -> dict[str, Any]:
        """As a baseline holds it."""
        return {
            "outside": self.outside.to_json(),
            "layer": self.layer.to_json(),
            "peak_activation_bytes": self.peak_activation_bytes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayeredCensus:
        """The reverse of :meth:`to_json`."""
        return cls(Census.from_json(data["outside"]), Census.from_json(data["layer"]), data["peak_activation_bytes"])


def take(lowered: Lowered, ops: list[Operation] | None = None) -> Census:
    """The census of one graph."""
    ops = operations(lowered) if ops is None else ops
    launched = Counter(op.node.type for op in ops if cost_of(op).launches)
    views = Counter(op.node.type for op in ops if not cost_of(op).launches)
    return Census(len(lowered.nodes), dict(launched), dict(views), total(ops))


def of_layers(few: Lowered, more: Lowered) -> LayeredCensus:
    """From a two-layer and a four-layer graph of the same step.

    Raises:
        ValueError: the layers do not repeat.
    """
    smaller = take(few)
    layer = take(more).minus(smaller).halved()
    return LayeredCensus(smaller.minus(layer, FEW), layer, peak_activation_bytes(few))


def of_size(
    size: Size, phase: Phase, batch: int, optimizations: Optimizations, *, prompt: int, capacity: int
) -> LayeredCensus:
    """Of one step of a documented size in bf16, by lowering it with two and with four layers."""
    few, more = (
        lower(size.config(layers=layers), phase, batch, capacity, optimizations, prompt=prompt, dtype=torch.bfloat16)
        for layers in (FEW, MORE)
    )
    return of_layers(few, more)
