"""GE graphs without the copies that only make a tensor contiguous.

Eager operators need ``.contiguous()`` on the parts of a fused product; in a GE graph every value is dense by itself,
and each such copy would be a node of its own: three per layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

CLONE = torch.ops.aten.clone.default


def drop_layout_copies(module: fx.GraphModule, example_inputs: Any = None, config: Any = None) -> None:
    """Remove clones of intermediate values that only ``npu::`` operators read, in place. A torchair FX pass.

    In a functionalised graph a clone changes a value's memory and nothing else. Kept are clones of graph inputs, whose
    memory is the caller's, and those that a view reads, which may depend on their strides.
    """
    # torchair names graphs on disk after the disassembly of this function, which shows addresses of nested code: none.
    for node in module.graph.find_nodes(op="call_function", target=CLONE):
        source = node.args[0]
        if source.op != "placeholder" and _is_read_by_npu_operators_only(node):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.graph.lint()


def _is_read_by_npu_operators_only(node: fx.Node) -> bool:
    targets = [user.target for user in node.users]
    return all(isinstance(target, torch._ops.OpOverload) and target.namespace == "npu" for target in targets)
