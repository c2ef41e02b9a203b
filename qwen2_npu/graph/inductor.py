"""Mode ``inductor``: CPU and CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from qwen2_npu.graph.steps import Step

if TYPE_CHECKING:
    from qwen2_npu.graph import GraphOptions

BACKEND: Any = "inductor"
"""What ``torch.compile`` is given; tests put a counting one here."""


def compiler(options: GraphOptions) -> Callable[[Step], Step]:
    """Compiles a step with inductor."""

    def compile_step(step: Step) -> Step:
        return torch.compile(
            step,
            backend=BACKEND,
            dynamic=options.dynamic,
            fullgraph=True,
            options=_options() if BACKEND == "inductor" else None,
        )

    return compile_step


def _options() -> dict[str, Any]:
    from qwen2_npu.graph.small_batch import SmallBatchProducts

    return {
        "post_grad_custom_pre_pass": SmallBatchProducts(),
        # A graph from the disk cache is guarded by the order of the rows' lengths, and another batch would compile
        # again.
        "fx_graph_cache": False,
    }
