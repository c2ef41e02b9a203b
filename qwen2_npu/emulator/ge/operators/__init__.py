"""The table of GE operators, by theme. ``table`` says how one is written.

Here is what Qwen2's graphs hold and what is close to it; all else is in ``beyond_qwen2``.
"""

from __future__ import annotations

from qwen2_npu.emulator.ge.operators import (  # noqa: F401 - each enters its operators
    activations,
    attention,
    beyond_qwen2,
    collectives,
    creation,
    elementwise,
    experts,
    indexing,
    normalization,
    products,
    quantization,
    reductions,
    shapes,
)
from qwen2_npu.emulator.ge.operators.table import TABLE, GEOperator, find

__all__ = ["TABLE", "GEOperator", "find"]
