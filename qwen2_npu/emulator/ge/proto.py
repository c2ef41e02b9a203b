"""A serialised GE graph as plain Python: nodes, their inputs, attributes and constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    "DT_FLOAT": torch.float32,
    "DT_FLOAT16": torch.float16,
    "DT_BF16": torch.bfloat16,
    "DT_DOUBLE": torch.float64,
    "DT_INT8": torch.int8,
    "DT_INT16": torch.int16,
    "DT_INT32": torch.int32,
    "DT_INT64": torch.int64,
    "DT_UINT8": torch.uint8,
    "DT_UINT16": torch.uint16,
    "DT_UINT32": torch.uint32,
    "DT_UINT64": torch.uint64,
    "DT_BOOL": torch.bool,
    "DT_COMPLEX64": torch.complex64,
    "DT_COMPLEX128": torch.complex128,
}
"""Name in the graph -> torch dtype. A dtype that is missing here is refused by name."""

ATTRIBUTE_DTYPES: dict[int, str] = {
    0: "DT_FLOAT",
    1: "DT_FLOAT16",
    2: "DT_INT8",
    3: "DT_INT32",
    4: "DT_UINT8",
    6: "DT_INT16",
    7: "DT_UINT16",
    8: "DT_UINT32",
    9: "DT_INT64",
    10: "DT_UINT64",
    11: "DT_DOUBLE",
    12: "DT_BOOL",
    16: "DT_COMPLEX64",
    17: "DT_COMPLEX128",
    27: "DT_BF16",
}
"""Attributes that name a dtype count differently from tensor descriptors: this is GE's own enumeration."""

CONTROL = -1
"""Output index of an input that only orders, as ``name:-1``."""


class UnsupportedGraphError(NotImplementedError):
    """A GE graph holds something that the emulated engine does not compute."""


@dataclass(frozen=True)
class Edge:
    """Output ``index`` of the node called ``node``."""

    node: str
    index: int

    @classmethod
    def parse(cls, text: str) -> Edge | None:
        """None for an optional input that is not fed."""
        if not text:
            return None
        name, _, index = text.rpartition(":")
        return cls(name, int(index))

    def __str__(self) -> str:
        return f"{self.node}:{self.index}"


@dataclass(frozen=True)
class Node:
    """One operator of the graph.

    Attributes:
        inputs: data inputs in the operator's order, None where an optional one is not fed.
        input_names: theirs; those of an input that takes any number of tensors end in digits.
        after: nodes that must run before, by control edges.
        references: output -> the input that it is, updated in place: GE's rule is that both bear one name.
        promised: per output the dtype that torch expects of it, None where the graph does not say.
        shapes: of the outputs, as the graph declares them (-1: unknown).
    """

    name: str
    type: str
    inputs: tuple[Edge | None, ...]
    input_names: tuple[str, ...]
    after: tuple[str, ...]
    references: dict[int, int]
    attributes: dict[str, Any]
    promised: tuple[torch.dtype | None, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"GE operator {self.type} ({self.name})"


def parse(graph: Any) -> list[Node]:
    """The nodes of a torchair ``GraphDef``, in its order."""
    return [_node(op) for op in graph.op]


def _node(op: Any) -> Node:
    edges = [Edge.parse(text) for text in op.input]
    # Descriptors stand for data inputs alone; control edges may come before or after these.
    data = [edge for edge in edges if edge is None or edge.index != CONTROL]
    names = tuple(desc.name for desc in op.input_desc)[: len(data)]
    return Node(
        name=op.name,
        type=op.type,
        inputs=tuple(data),
        input_names=names,
        after=tuple(edge.node for edge in edges if edge is not None and edge.index == CONTROL),
        references={i: names.index(desc.name) for i, desc in enumerate(op.output_desc) if desc.name in names},
        attributes={name: attribute(value) for name, value in op.attr.items() if not name.startswith("_")},
        promised=tuple(dtype_or_none(desc) if "_meta" in desc.attr else None for desc in op.output_desc),
        shapes=tuple(tuple(desc.shape.dim) for desc in op.output_desc),
    )


def attribute(value: Any) -> Any:
    """An ``AttrDef`` as the Python value it stands for."""
    kind = value.WhichOneof("value")
    if kind == "s":
        return value.s.decode()
    if kind == "t":
        return tensor(value.t)
    if kind == "list":
        return _list(value.list)
    if kind == "list_list_int":
        return [list(item.list_i) for item in value.list_list_int.list_list_i]
    return getattr(value, kind) if kind else None


def _list(value: Any) -> list[Any]:
    for field in ("i", "f", "b", "s", "dt"):
        items = list(getattr(value, field))
        if items:
            return [item.decode() if field == "s" else item for item in items]
    return []


def attribute_dtype(number: int) -> torch.dtype:
    """The dtype that an attribute such as Cast's ``dst_type`` names.

    Raises:
        UnsupportedGraphError: it is not emulated.
    """
    if number not in ATTRIBUTE_DTYPES:
        raise UnsupportedGraphError(f"GE data type {number} is not emulated")
    return DTYPES[ATTRIBUTE_DTYPES[number]]


def dtype_or_none(desc: Any) -> torch.dtype | None:
    """The dtype a tensor descriptor declares; None for one that is not emulated (and for undefined)."""
    enum = type(desc).DESCRIPTOR.fields_by_name["dtype"].enum_type
    return DTYPES.get(enum.values_by_number[desc.dtype].name)


def tensor(value: Any) -> torch.Tensor:
    """A constant's value.

    Raises:
        UnsupportedGraphError: its dtype is not emulated, or its bytes do not fit its shape.
    """
    dtype = dtype_or_none(value.desc)
    if dtype is None:
        raise UnsupportedGraphError(f"a constant of data type {value.desc.dtype} is not emulated")
    shape = list(value.desc.shape.dim)
    made = torch.empty(shape, dtype=dtype)
    if made.nbytes != len(value.data):
        raise UnsupportedGraphError(
            f"a constant of shape {tuple(shape)} and dtype {dtype} has {len(value.data)} bytes: a view of a larger "
            "tensor? Make it contiguous"
        )
    if value.data:
        made = torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(shape)
    return made
