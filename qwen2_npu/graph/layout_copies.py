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
    for node in module.graph.find_nodes(op="call_function", target=CLONE):
        source = node.args[0]
        if source.op != "placeholder" and all(_is_npu_operator(user) for user in node.users):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.graph.lint()


def _is_npu_operator(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "npu"
