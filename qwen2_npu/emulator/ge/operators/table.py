"""How an operator of the table is written, found and prepared for a node.

    @operator("Transpose", views="x")
    def transpose(x: Tensor, perm: Ints) -> Tensor:
        return x.permute(perm)

Parameters before ``*`` are the operator's inputs, under the names its prototype gives them; a trailing underscore
keeps a name apart from Python's keywords. Their types say how an input is passed:

    Tensor, Tensor | None    the tensor; None where an optional input is not fed
    list[Tensor]             an input that takes any number of tensors
    Ints, Ints | None        a small tensor that the host reads: its numbers
    Scalar, Scalar | None    the one number of such a tensor

Parameters after ``*`` are attributes, with the prototype's defaults. The result is a tensor or a tuple of them. Where
the prototype gives an output the name of an input, the function updates that input in place and returns it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen2_npu.emulator.ge.proto import Edge, Node, UnsupportedGraphError

Tensor = torch.Tensor
Ints = tuple[int, ...]
Scalar = int | float | bool
Values = Sequence[Any]
Kernel = Callable[[Values], Any]
"""Computes one node from the values of its inputs, in the node's order."""

NOT_THE_OPERATORS = frozenset(
    {"input_layout_info", "output_layout_info", "nn_module_stack", "torchair_enable_data_dump"}
)
"""Attributes that torchair hangs on nodes, and that change no result."""


@dataclass(frozen=True)
class Parameter:
    """An input as the function takes it: ``kind`` is "tensor", "tensors", "ints" or "scalar"."""

    name: str
    kind: str
    optional: bool


_KINDS: dict[Any, tuple[str, bool]] = {
    Tensor: ("tensor", False),
    Tensor | None: ("tensor", True),
    list[Tensor]: ("tensors", False),
    Ints: ("ints", False),
    Ints | None: ("ints", True),
    Scalar: ("scalar", False),
    Scalar | None: ("scalar", True),
    inspect.Parameter.empty: ("tensor", False),
}


@dataclass(frozen=True)
class GEOperator:
    """An entry of the table.

    Attributes:
        parameters: the inputs.
        attributes: name -> default; ``REQUIRED`` where there is none.
        fixed: attributes whose other values are not emulated, with the one that is.
        views: the input whose memory results may share as views of it; empty where they never do.
    """

    type: str
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    attributes: Mapping[str, Any]
    fixed: Mapping[str, Any]
    views: str

    def bind(self, node: Node, known: Mapping[Edge, Tensor]) -> Kernel:
        """What computes ``node``.

        Args:
            known: constants; numbers that the host reads from them are read now.

        Raises:
            UnsupportedGraphError: an input or an attribute that this operator lacks, or a value it cannot honour.
        """
        function, attributes = self.function, self._attributes(node)
        readers = [self._reader(parameter, node, known) for parameter in self.parameters]
        self._refuse_others(node)
        if attributes:
            return lambda values: function(*[read(values) for read in readers], **attributes)
        if len(readers) == 1:
            (only,) = readers
            return lambda values: function(only(values))
        if len(readers) == 2:
            first, second = readers
            return lambda values: function(first(values), second(values))
        return lambda values: function(*[read(values) for read in readers])

    def _attributes(self, node: Node) -> dict[str, Any]:
        given = {name: value for name, value in node.attributes.items() if name not in NOT_THE_OPERATORS}
        for name, value in self.fixed.items():
            if not _same(given.pop(name, value), value):
                raise UnsupportedGraphError(
                    f"{node} with {name}={node.attributes[name]!r} is not emulated; only {name}={value!r} is"
                )
        unknown = sorted(given.keys() - self.attributes.keys())
        if unknown:
            raise UnsupportedGraphError(f"{node}: attribute {unknown[0]} is not emulated")
        absent = [name for name, default in self.attributes.items() if default is REQUIRED and name not in given]
        if absent:
            raise UnsupportedGraphError(f"{node} lacks attribute {absent[0]}")
        return given

    def _reader(self, parameter: Parameter, node: Node, known: Mapping[Edge, Tensor]) -> Callable[[Values], Any]:
        if parameter.kind == "tensors":
            positions = [i for i, name in enumerate(node.input_names) if self._is_one_of(parameter.name, name)]
            return lambda values: [values[i] for i in positions]
        position = node.input_names.index(parameter.name) if parameter.name in node.input_names else None
        edge = None if position is None else node.inputs[position]
        if position is None or edge is None:
            if not parameter.optional:
                raise UnsupportedGraphError(f"{node}: input {parameter.name} is not fed")
            return lambda values: None
        if parameter.kind == "tensor":
            return lambda values: values[position]
        read = _read_ints if parameter.kind == "ints" else _read_scalar
        if edge in known:
            constant = read(known[edge])
            return lambda values: constant
        return lambda values: read(values[position])

    def _is_one_of(self, parameter: str, name: str) -> bool:
        """Whether the input ``name`` is one of those that ``parameter`` collects."""
        rest = name.removeprefix(parameter)
        return name.startswith(parameter) and rest.isdigit() and all(p.name != name for p in self.parameters)

    def _refuse_others(self, node: Node) -> None:
        single = {p.name for p in self.parameters if p.kind != "tensors"}
        several = [p.name for p in self.parameters if p.kind == "tensors"]
        for name, edge in zip(node.input_names, node.inputs, strict=True):
            if edge is not None and name not in single and not any(self._is_one_of(p, name) for p in several):
                raise UnsupportedGraphError(f"{node}: input {name} is not emulated")


REQUIRED = inspect.Parameter.empty
"""Stands for the default of an attribute that has none."""

TABLE: dict[str, GEOperator] = {}
"""GE operator type -> its entry."""


def operator(
    *types: str, views: str = "", fixed: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put the decorated function into the table under ``types``. See ``GEOperator`` for the other arguments."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())
        inputs = tuple(Parameter(_name(p), *_KINDS[p.annotation]) for p in parameters if p.kind is not p.KEYWORD_ONLY)
        attributes = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        for name in types:
            if name in TABLE:
                raise ValueError(f"GE operator {name} is in the table twice")
            TABLE[name] = GEOperator(name, function, inputs, attributes, dict(fixed or {}), views)
        return function

    return enter


def find(node: Node) -> GEOperator:
    """The operator of ``node``.

    Raises:
        UnsupportedGraphError: the table lacks it; the message names it.
    """
    found = TABLE.get(node.type)
    if found is None:
        raise UnsupportedGraphError(
            f"{node} is not in the emulator's table of GE operators, qwen2_npu.emulator.ge.operators"
        )
    return found


def _same(given: Any, wanted: Any) -> bool:
    """Whether two attributes agree; the graph keeps floats in 32 bits."""
    if isinstance(given, float) and isinstance(wanted, float):
        return math.isclose(given, wanted, rel_tol=1e-6)
    return bool(given == wanted)


def _name(parameter: inspect.Parameter) -> str:
    return parameter.name.rstrip("_")


def _read_ints(tensor: Tensor) -> Ints:
    return tuple(tensor.reshape(-1).tolist())


def _read_scalar(tensor: Tensor) -> Scalar:
    value: Scalar = tensor.item()
    return value
