from __future__ import annotations

import pytest

from qwen2_npu.emulator.ge.order import ordered
from qwen2_npu.emulator.ge.proto import Edge, Node, UnsupportedGraphError


def node(name: str, *reads: str, after: tuple[str, ...] = ()) -> Node:
    inputs = tuple(Edge(read, 0) for read in reads)
    return Node(name, "Add", inputs, tuple(reads), after, {}, {}, (None,), ((),))


def names(*nodes: Node) -> list[str]:
    return [found.name for found in ordered(list(nodes))]


def test_keeps_the_programs_order() -> None:
    assert names(node("b"), node("a"), node("c", "a")) == ["b", "a", "c"]


def test_a_reader_waits_for_what_stands_behind_it() -> None:
    assert names(node("a", "symbol"), node("b"), node("symbol")) == ["symbol", "a", "b"]


def test_control_edges_order() -> None:
    assert names(node("reader", after=("writer",)), node("writer")) == ["writer", "reader"]


def test_an_input_that_is_not_fed_orders_nothing() -> None:
    unfed = Node("a", "Add", (None,), ("x",), (), {}, {}, (None,), ((),))
    assert names(unfed) == ["a"]


def test_long_chains() -> None:
    chain = [node(str(i), str(i + 1)) for i in range(5000)]
    assert names(*chain, node("5000"))[:2] == ["5000", "4999"]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("a", "b"), node("b", "a")], "cycle through a"),
        ([node("a", "a")], "cycle through a"),
        ([node("a", after=("b",)), node("b", "a")], "cycle through a"),
        ([node("a", "nowhere")], r"GE operator Add \(a\) reads nowhere, which the graph does not have"),
        ([node("a"), node("a")], "two nodes .* one name"),
    ],
)
def test_graphs_that_cannot_run(nodes: list[Node], message: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=message):
        ordered(nodes)
