"""How an operator of the table is written and found.

    @operator("Transpose")
    def transpose(x, perm):
        return x.permute(perm.tolist())

Parameters before ``*`` are the inputs in GE's order (None where one is not fed); those after it are attributes, by
name. ``@operator(..., inputs="all")`` passes the inputs as one list. The result is a tensor or a tuple of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from qwen2_npu.emulator.ge.proto import Node, UnsupportedGraphError

Tensor = torch.Tensor
Inputs = Sequence[Tensor | None]


class Operator(Protocol):
    """Computes a node: its inputs in order, its outputs in order."""

    def __call__(self, node: Node, inputs: Inputs) -> Sequence[Tensor]: ...


TABLE: dict[str, Operator] = {}
"""GE operator type -> what computes it."""

IN_PLACE: dict[str, tuple[int, ...]] = {}
"""GE operator type -> positions of the inputs it writes."""


def operator(*types: str, variadic: bool = False, writes: tuple[int, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Put the decorated function into the table under ``types``.

    Args:
        variadic: pass all inputs as one list, as for operators with any number of them.
        writes: positions of inputs that the operator updates in place.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters.values()
        wanted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        required = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        count = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)

        def compute(node: Node, inputs: Inputs) -> Sequence[Tensor]:
            attributes = {name: node.attributes[name] for name in wanted if name in node.attributes}
            absent = [name for name in required if name not in attributes and name != "node"]
            if absent:
                raise UnsupportedGraphError(f"GE operator {node.type} ({node.name}) lacks attribute {absent[0]}")
            if "node" in wanted:
                attributes["node"] = node
            if variadic:
                result = function(list(inputs), **attributes)
            else:
                if any(value is not None for value in inputs[count:]):
                    extra = [node.input_names[i] for i in range(count, len(inputs)) if inputs[i] is not None]
                    raise UnsupportedGraphError(f"GE operator {node.type}: input {extra[0]} is not emulated")
                result = function(*inputs[:count], *[None] * (count - len(inputs)), **attributes)
            return result if isinstance(result, tuple | list) else (result,)

        for name in types:
            if name in TABLE:
                raise ValueError(f"GE operator {name} is in the table twice")
            TABLE[name] = compute
            if writes:
                IN_PLACE[name] = writes
        return function

    return enter


def find(node: Node) -> Operator:
    """The operator of ``node``.

    Raises:
        UnsupportedGraphError: the table lacks it; the message names it.
    """
    found = TABLE.get(node.type)
    if found is None:
        raise UnsupportedGraphError(
            f"GE operator {node.type} (node {node.name}) is not in the emulator's table, qwen2_npu.emulator.ge.operators"
        )
    return found
