"""Runs a GE graph on the CPU over emulated device memory: what CANN's engine does behind torchair.

The graph is planned once: order, what each node reads, when a value is dead. Memory has GE's semantics: a Data node is
the caller's memory, an operator that updates its input in place does so there, an output that is assigned to an
input's memory is written when its producer runs, and nodes run in the order that data and control edges ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen2_npu.emulator.eager.memory import cpu_view, to_device
from qwen2_npu.emulator.ge import operators
from qwen2_npu.emulator.ge.proto import Edge, Node, UnsupportedGraphError, parse

STRUCTURE = frozenset({"Data", "RefData", "Const", "ConstPlaceHolder", "NetOutput"})
"""Node types the engine itself deals with; all others are in the table of operators."""


@dataclass
class Step:
    """One node, ready to run. ``dead``: values nobody reads after it."""

    node: Node
    run: operators.Operator
    dead: list[Edge] = field(default_factory=list)


@dataclass
class Program:
    """A planned graph.

    ``data``: input index -> node. ``constants``: values known before any run. ``outputs``: what the graph returns.
    """

    name: str
    data: dict[int, Node]
    constants: dict[Edge, torch.Tensor]
    steps: list[Step]
    outputs: tuple[Edge, ...]

    @classmethod
    def plan(cls, name: str, nodes: list[Node]) -> Program:
        """Order the nodes and find the operator of each.

        Raises:
            UnsupportedGraphError: an operator the table lacks, named; no NetOutput; a cycle.
        """
        data: dict[int, Node] = {}
        constants: dict[Edge, torch.Tensor] = {}
        steps: list[Step] = []
        outputs: tuple[Edge, ...] | None = None
        for node in ordered(nodes):
            if node.type in ("Data", "RefData"):
                data[node.attributes["index"]] = node
            elif node.type == "Const":
                constants[Edge(node.name, 0)] = node.attributes["value"]
            elif node.type == "ConstPlaceHolder":
                constants[Edge(node.name, 0)] = placeholder(node)
            elif node.type == "NetOutput":
                outputs = tuple(edge for edge in node.inputs if edge is not None)
            else:
                steps.append(Step(node, operators.find(node)))
        if outputs is None:
            raise UnsupportedGraphError(f"GE graph {name!r} has no NetOutput")
        _mark_dead(steps, set(outputs) | set(constants))
        return cls(name, data, constants, steps, outputs)

    def run(self, inputs: Sequence[torch.Tensor], assigned: Sequence[torch.Tensor | None] = ()) -> list[torch.Tensor]:
        """Outputs as CPU tensors.

        Args:
            inputs: CPU tensors over the callers' memory, by Data index.
            assigned: per output, memory that it must be in, or None.
        """
        values: dict[Edge, torch.Tensor] = dict(self.constants)
        for index, node in self.data.items():
            value = inputs[index]
            # torchair passes a scalar symbol as a vector of one.
            values[Edge(node.name, 0)] = value.reshape(()) if node.shapes[0] == () and value.dim() == 1 else value
        wanted = {edge: memory for edge, memory in zip(self.outputs, assigned, strict=False) if memory is not None}
        for edge, memory in wanted.items():
            if edge in values:
                values[edge] = _write(values[edge], memory)
        for step in self.steps:
            node = step.node
            try:
                results = step.run(node, [None if edge is None else values[edge] for edge in node.inputs])
            except UnsupportedGraphError:
                raise
            except Exception as error:
                raise RuntimeError(f"GE operator {node.type} ({node.name}) failed: {error}") from error
            for index, value in enumerate(results):
                edge = Edge(node.name, index)
                values[edge] = _write(value, wanted[edge]) if edge in wanted else value
            for edge in step.dead:
                values.pop(edge, None)
        return [values[edge] for edge in self.outputs]


def ordered(nodes: list[Node]) -> list[Node]:
    """The nodes, each after what it reads and waits for; otherwise in their given order."""
    by_name = {node.name: node for node in nodes}
    done: dict[str, bool] = {}
    result: list[Node] = []

    def needs(node: Node) -> list[str]:
        return [edge.node for edge in node.inputs if edge is not None] + list(node.after)

    for root in nodes:
        stack: list[tuple[Node, int]] = [(root, 0)]
        while stack:
            node, position = stack.pop()
            if done.get(node.name) and position == 0:
                continue
            if position == 0:
                done[node.name] = False
            waiting = needs(node)
            while position < len(waiting) and done.get(waiting[position]):
                position += 1
            if position == len(waiting):
                done[node.name] = True
                result.append(node)
                continue
            missing = waiting[position]
            if missing not in by_name:
                raise UnsupportedGraphError(f"GE node {node.name} reads {missing}, which the graph does not have")
            if done.get(missing) is False:
                raise UnsupportedGraphError(f"the GE graph has a cycle through {missing}")
            stack += [(node, position), (by_name[missing], 0)]
    return result


def placeholder(node: Node) -> torch.Tensor:
    """A frozen parameter: the graph holds its device address."""
    attributes = node.attributes
    dtype, shape = attributes["dtype"], list(attributes["origin_shape"])
    storage = torch._C._construct_storage_from_data_pointer(attributes["addr"], torch.device("cpu"), attributes["size"])
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def _mark_dead(steps: list[Step], kept: set[Edge]) -> None:
    seen = set(kept)
    for step in reversed(steps):
        for edge in dict.fromkeys(edge for edge in step.node.inputs if edge is not None):
            if edge not in seen:
                seen.add(edge)
                step.dead.append(edge)


def _write(value: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Put ``value`` where ``memory`` is, unless it is there."""
    if value.data_ptr() != memory.data_ptr() or value.stride() != memory.stride():
        memory.copy_(value.reshape(memory.shape))
    return memory


class EmulatedGraph:
    """What torchair holds in place of its ``TorchNpuGraph``."""

    def __init__(self, name: str = "") -> None:
        self.name = str(name)
        self._program: Program | None = None

    def load(self, ge_graph: Any, options: dict[str, str] | None = None) -> None:
        """Read the graph; raises for an operator the engine does not have, by its name."""
        self._program = Program.plan(self.name, parse(ge_graph))

    def compile(self) -> None:
        """Planning happened in ``load``."""

    def auto_tune(self, example_inputs: Sequence[torch.Tensor] = (), stream: Any = None) -> None:
        """There is no kernel to tune."""

    def run(
        self, inputs: Sequence[torch.Tensor], assigned_outputs: Sequence[torch.Tensor | None] = (), stream: Any = None
    ) -> list[torch.Tensor]:
        """Outputs on the device of the inputs; assigned ones are the very tensors given."""
        if self._program is None:
            raise RuntimeError(f"GE graph {self.name!r} is run before it is loaded")
        with torch.no_grad():
            views = [_as_cpu(tensor) for tensor in inputs]
            memory = [None if tensor is None else _as_cpu(tensor) for tensor in assigned_outputs]
            results = self._program.run(views, memory)
            device = _device(inputs)
            return [
                assigned_outputs[index]
                if index < len(assigned_outputs) and assigned_outputs[index] is not None
                else to_device(result, device)
                for index, result in enumerate(results)
            ]  # type: ignore[misc]  # the condition excludes None


def _as_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return cpu_view(tensor) if tensor.device.type == "npu" else tensor


def _device(inputs: Sequence[torch.Tensor]) -> torch.device:
    for tensor in inputs:
        if tensor.device.type == "npu":
            return tensor.device
    return torch.device("npu", torch.npu.current_device())  # type: ignore[attr-defined]
