"""The order in which a graph's nodes run."""

from __future__ import annotations

from qwen2_npu.emulator.ge.proto import Node, UnsupportedGraphError


def ordered(nodes: list[Node]) -> list[Node]:
    """The nodes, each after what it reads and waits for; otherwise in their given order.

    torchair lists nodes in the program's order, except that in dynamic mode the Data node of a symbol may stand after
    its reader. Of two nodes that nothing orders, the program's first runs first: a reader of memory before its writer.

    Raises:
        UnsupportedGraphError: two nodes of one name, an input that no node makes, a cycle.
    """
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        raise UnsupportedGraphError("two nodes of the GE graph have one name")
    result: list[Node] = []
    state: dict[str, bool] = {}  # False: under way, True: in the result
    for root in nodes:
        if root.name in state:
            continue
        state[root.name] = False
        stack = [(root, iter(_needs(root)))]
        while stack:
            node, needs = stack[-1]
            missing = next((name for name in needs if not state.get(name)), None)
            if missing is None:
                state[node.name] = True
                result.append(node)
                stack.pop()
            elif missing not in by_name:
                raise UnsupportedGraphError(f"{node} reads {missing}, which the graph does not have")
            elif missing in state:
                raise UnsupportedGraphError(f"the GE graph has a cycle through {missing}")
            else:
                state[missing] = False
                stack.append((by_name[missing], iter(_needs(by_name[missing]))))
    return result


def _needs(node: Node) -> list[str]:
    return [edge.node for edge in node.inputs if edge is not None] + list(node.after)
