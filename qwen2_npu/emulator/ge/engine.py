"""Runs a GE graph on the CPU over emulated device memory: what CANN's engine does behind torchair.

The graph is planned once: the order of its nodes, where each value lives, what must be copied, when a value is dead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qwen2_npu.emulator.ge import operators
from qwen2_npu.emulator.ge.memory import Access, Copies, plan_copies
from qwen2_npu.emulator.ge.operators.table import Kernel
from qwen2_npu.emulator.ge.order import ordered
from qwen2_npu.emulator.ge.proto import Edge, Node, UnsupportedGraphError, attribute_dtype

Tensor = torch.Tensor

STRUCTURE = frozenset({"Data", "RefData", "Const", "ConstPlaceHolder", "NetOutput"})
"""Node types the engine itself deals with; all others are in the table of operators."""


class NodeListener(Protocol):
    """Called in place of a node; ``run(values)`` computes it from the values of its inputs."""

    def __call__(self, node: Node, run: Callable[[list[Any]], tuple[Tensor, ...]], values: list[Any]) -> Any: ...


listeners: list[NodeListener] = []
"""Watchers of every node, for fault injection and tracing. Empty in ordinary runs, so that watching costs nothing."""


@dataclass(frozen=True)
class NodeStep:
    """One node, ready to run.

    Attributes:
        reads, makes: slots of its inputs (None where one is not fed) and outputs.
        dead: slots nobody reads after it.
    """

    node: Node
    kernel: Kernel
    reads: tuple[int | None, ...]
    makes: tuple[int, ...]
    copies: Copies
    dead: tuple[int, ...]

    def run(self, values: list[Any]) -> tuple[Tensor, ...]:
        """The node's outputs from its inputs, in order.

        Raises:
            RuntimeError: the operator failed, or made something else than the graph promises; the node is named.
        """
        try:
            result = self.kernel(values)
        except UnsupportedGraphError:
            raise
        except Exception as error:
            shapes = ", ".join(_described(value) for value in values)
            raise RuntimeError(f"{self.node} failed on {shapes}: {error}") from error
        results = result if type(result) is tuple else (result,) if isinstance(result, Tensor) else tuple(result)
        for value, dtype in zip(results, self.node.promised, strict=False):
            if dtype is not None and value.dtype is not dtype:
                raise RuntimeError(f"{self.node} computed {value.dtype}, and the graph declares {dtype}")
        return results


@dataclass(frozen=True)
class Program:
    """A planned graph.

    Attributes:
        data: per input its index, slot and whether the graph wants a scalar.
        initial: values before the first step: constants; None elsewhere.
        steps: what runs, in order.
        outputs: slots the graph returns.
    """

    name: str
    data: tuple[tuple[int, int, bool], ...]
    initial: tuple[Tensor | None, ...]
    steps: tuple[NodeStep, ...]
    outputs: tuple[int, ...]

    @classmethod
    def plan(cls, name: str, nodes: list[Node]) -> Program:
        """Order the nodes, find the operator of each and lay the values out.

        Raises:
            UnsupportedGraphError: an operator the table lacks, named; an input or attribute that is not emulated;
                no NetOutput; a cycle.
        """
        in_order = ordered(nodes)
        slots: dict[Edge, int] = {}
        constants: dict[Edge, Tensor] = {}
        data: list[tuple[int, int, bool]] = []
        compute: list[Node] = []
        outputs: tuple[Edge, ...] | None = None
        for node in in_order:
            if node.type == "NetOutput":
                outputs = tuple(edge for edge in node.inputs if edge is not None)
                continue
            for index in range(len(node.promised)):
                slots[Edge(node.name, index)] = len(slots)
            first = Edge(node.name, 0)
            if node.type in ("Data", "RefData"):
                data.append((node.attributes["index"], slots[first], node.shapes[0] == ()))
            elif node.type == "Const":
                constants[first] = node.attributes["value"]
            elif node.type == "ConstPlaceHolder":
                constants[first] = placeholder(node)
            else:
                compute.append(node)
        if outputs is None:
            raise UnsupportedGraphError(f"GE graph {name!r} has no NetOutput")
        _check_edges(in_order, slots)
        initial: list[Tensor | None] = [None] * len(slots)
        for edge, value in constants.items():
            initial[slots[edge]] = value
        returned = tuple(slots[edge] for edge in outputs)
        steps = _steps(compute, slots, constants, returned)
        return cls(name, tuple(data), tuple(initial), steps, returned)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs, which may share memory with the inputs and with one another.

        Args:
            inputs: CPU tensors over the callers' memory, by Data index.

        Raises:
            ValueError: an input is missing.
            RuntimeError: an operator failed; the message names the node.
        """
        values: list[Any] = list(self.initial)
        for index, slot, scalar in self.data:
            if index >= len(inputs):
                raise ValueError(f"GE graph {self.name!r} has an input {index}, and {len(inputs)} are given")
            # torchair passes a symbol as a vector of one.
            values[slot] = inputs[index].reshape(()) if scalar else inputs[index]
        for step in self.steps:
            for slot in step.copies.snapshots:
                values[slot] = values[slot].clone()
            given = [None if slot is None else values[slot] for slot in step.reads]
            if step.copies.constants:
                given = _with_copies(step, given)
            results = step.run(given) if not listeners else _through_listeners(step, given)
            if step.copies.results:
                results = tuple(result.clone(memory_format=torch.contiguous_format) for result in results)
            for slot, result in zip(step.makes, results, strict=False):
                values[slot] = result
            for slot in step.dead:
                values[slot] = None
        return [values[slot] for slot in self.outputs]


def _with_copies(step: NodeStep, given: list[Any]) -> list[Any]:
    """The inputs of a step that writes a constant, with a copy of that constant."""
    pairs = zip(step.reads, given, strict=True)
    return [value.clone() if slot in step.copies.constants else value for slot, value in pairs]


def placeholder(node: Node) -> Tensor:
    """A frozen parameter: the graph holds its device address."""
    attributes = node.attributes
    dtype, shape = attribute_dtype(attributes["dtype"]), list(attributes["origin_shape"])
    over = torch._C._construct_storage_from_data_pointer(attributes["addr"], torch.device("cpu"), attributes["size"])
    return torch.empty(0, dtype=dtype).set_(over).as_strided(shape, _dense_strides(shape))


def _dense_strides(shape: list[int]) -> list[int]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return strides


def _check_edges(nodes: list[Node], slots: dict[Edge, int]) -> None:
    for node in nodes:
        for edge in node.inputs:
            if edge is not None and edge not in slots:
                raise UnsupportedGraphError(f"{node} reads {edge}, and {edge.node} has no such output")


def _steps(
    nodes: list[Node], slots: dict[Edge, int], constants: dict[Edge, Tensor], returned: tuple[int, ...]
) -> tuple[NodeStep, ...]:
    kernels: list[Kernel] = []
    accesses: list[Access] = []
    reads: list[tuple[int | None, ...]] = []
    for node in nodes:
        found = operators.find(node)
        kernels.append(found.bind(node, constants))
        reads.append(tuple(None if edge is None else slots[edge] for edge in node.inputs))
        fed = tuple(slot for slot in reads[-1] if slot is not None)
        makes = tuple(slots[Edge(node.name, index)] for index in range(len(node.promised)))
        writes = {makes[i]: slot for i, given in node.references.items() if (slot := reads[-1][given]) is not None}
        seen = reads[-1][node.input_names.index(found.views)] if found.views in node.input_names else None
        accesses.append(Access(fed, makes, writes, seen))
    fixed = frozenset(slots[edge] for edge in constants)
    copies = plan_copies(accesses, fixed, returned)
    dead = _dead(accesses, fixed | set(returned))
    return tuple(
        NodeStep(node, kernel, read, access.makes, copy, gone)
        for node, kernel, read, access, copy, gone in zip(nodes, kernels, reads, accesses, copies, dead, strict=True)
    )


def _dead(accesses: list[Access], kept: frozenset[int]) -> list[tuple[int, ...]]:
    """Per step, the values that no later step reads."""
    seen = set(kept)
    dead: list[tuple[int, ...]] = []
    for access in reversed(accesses):
        gone = tuple(slot for slot in dict.fromkeys(access.reads + access.makes) if slot not in seen)
        seen.update(gone)
        dead.append(gone)
    return dead[::-1]


def _through_listeners(step: NodeStep, values: list[Any]) -> tuple[Tensor, ...]:
    run: Callable[[list[Any]], tuple[Tensor, ...]] = step.run
    for listener in listeners:
        run = _bound(listener, step.node, run)
    return run(values)


def _bound(
    listener: NodeListener, node: Node, run: Callable[[list[Any]], tuple[Tensor, ...]]
) -> Callable[[list[Any]], tuple[Tensor, ...]]:
    return lambda values: listener(node, run, values)


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(value)
