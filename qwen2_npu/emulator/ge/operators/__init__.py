"""The table of GE operators, by theme. ``table`` says how one is written."""

from __future__ import annotations

from qwen2_npu.emulator.ge.operators import (  # noqa: F401 - each enters its operators
    activations,
    attention,
    collectives,
    creation,
    elementwise,
    images,
    indexing,
    losses,
    normalization,
    padding,
    products,
    random,
    reductions,
    shapes,
)
from qwen2_npu.emulator.ge.operators.table import TABLE, Operator, find

__all__ = ["TABLE", "Operator", "find"]
