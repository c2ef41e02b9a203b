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

ATTRIBUTE_DTYPES: tuple[str | None, ...] = (
    "DT_FLOAT", "DT_FLOAT16", "DT_INT8", "DT_INT32", "DT_UINT8", None, "DT_INT16", "DT_UINT16", "DT_UINT32", "DT_INT64",
    "DT_UINT64", "DT_DOUBLE", "DT_BOOL", "DT_STRING", None, None, "DT_COMPLEX64", "DT_COMPLEX128", None, None, None,
    None, None, None, None, None, None, "DT_BF16",
)  # fmt: skip
"""``dt`` attributes count differently from tensor descriptors: this is GE's own enumeration, by position."""

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


@dataclass(frozen=True)
class Node:
    """One operator of the graph.

    ``inputs``: data inputs in the operator's order, None where an optional one is not fed. ``input_names``: theirs.
    ``after``: nodes that must run before, by control edges. ``shapes``: of the outputs, as the graph declares them
    (-1: unknown).
    """

    name: str
    type: str
    inputs: tuple[Edge | None, ...]
    input_names: tuple[str, ...]
    after: tuple[str, ...]
    attributes: dict[str, Any]
    outputs: int
    output_dtypes: tuple[torch.dtype | None, ...]
    shapes: tuple[tuple[int, ...], ...]


def parse(graph: Any) -> list[Node]:
    """The nodes of a torchair ``GraphDef``, in its order."""
    return [_node(op) for op in graph.op]


def _node(op: Any) -> Node:
    edges = [Edge.parse(text) for text in op.input]
    data = [(edge, desc) for edge, desc in zip(edges, [*op.input_desc, *[None] * len(edges)], strict=False)
            if edge is None or edge.index != CONTROL]  # fmt: skip
    return Node(
        name=op.name,
        type=op.type,
        inputs=tuple(edge for edge, _ in data),
        input_names=tuple(desc.name if desc is not None else "" for _, desc in data),
        after=tuple(edge.node for edge in edges if edge is not None and edge.index == CONTROL),
        attributes={name: attribute(value) for name, value in op.attr.items() if not name.startswith("_")},
        outputs=len(op.output_desc),
        output_dtypes=tuple(dtype_or_none(desc) for desc in op.output_desc),
        shapes=tuple(tuple(desc.shape.dim) for desc in op.output_desc),
    )


def attribute(value: Any) -> Any:
    """An ``AttrDef`` as the Python value it stands for."""
    kind = value.WhichOneof("value")
    if kind == "s":
        return value.s.decode()
    if kind == "t":
        return tensor(value.t)
    if kind == "dt":
        return attribute_dtype(value.dt)
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
    """The dtype of a ``dt`` attribute."""
    name = ATTRIBUTE_DTYPES[number] if 0 <= number < len(ATTRIBUTE_DTYPES) else None
    if name is None or name not in DTYPES:
        raise UnsupportedGraphError(f"GE data type {number} ({name}) is not emulated")
    return DTYPES[name]


def dtype_or_none(desc: Any) -> torch.dtype | None:
    """The dtype a tensor descriptor declares; None for one that is not emulated (and for undefined)."""
    enum = type(desc).DESCRIPTOR.fields_by_name["dtype"].enum_type
    return DTYPES.get(enum.values_by_number[desc.dtype].name)


def tensor(value: Any) -> torch.Tensor:
    """A constant's value.

    Raises:
        UnsupportedGraphError: its dtype is not emulated.
    """
    dtype = dtype_or_none(value.desc)
    if dtype is None:
        raise UnsupportedGraphError(f"a constant of data type {value.desc.dtype} is not emulated")
    shape = list(value.desc.shape.dim)
    if not value.data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(shape)
