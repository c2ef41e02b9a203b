"""Peak memory of a lowered graph's intermediate values."""

from __future__ import annotations

from qwen2_npu.conformance.graph.lowering import Lowered
from qwen2_npu.conformance.graph.shapes import Operation, operations
from qwen2_npu.emulator.ge.proto import Edge


def peak_activation_bytes(lowered: Lowered) -> int:
    """The most that intermediate values and results occupy at once, each freed after its last reader.

    Views, and values written in place, take no memory of their own. GE may reuse memory better or worse: this is what
    the graph itself asks for, in its own order.
    """
    ops = operations(lowered)
    home: dict[Edge, Edge] = {}  # value -> the value whose memory it lies in
    size: dict[Edge, int] = {}
    born: dict[Edge, int] = {}
    dies: dict[Edge, int] = {}
    for at, op in enumerate(ops):
        for edge in op.node.inputs:
            if edge in home:
                dies[home[edge]] = at
        for index, value in enumerate(op.outputs):
            edge, source = Edge(op.node.name, index), _lies_in(op, index)
            if source is not None:
                home[edge] = home.get(source, source)
            else:
                home[edge], size[edge], born[edge], dies[edge] = edge, value.nbytes, at, at
    for node in lowered.nodes:
        for edge in node.inputs if node.type == "NetOutput" else ():
            if edge in home:
                dies[home[edge]] = len(ops)
    change = [0] * (len(ops) + 2)
    for edge, nbytes in size.items():
        change[born[edge]] += nbytes
        change[dies[edge] + 1] -= nbytes
    live = peak = 0
    for step in change:
        live += step
        peak = max(peak, live)
    return peak


def _lies_in(op: Operation, index: int) -> Edge | None:
    """The input whose memory output ``index`` lies in; None where it has its own."""
    if op.is_view:
        return op.node.inputs[0]
    written = op.node.references.get(index)
    return None if written is None else op.node.inputs[written]
