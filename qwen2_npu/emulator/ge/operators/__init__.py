"""The table of GE operators, by theme. ``table`` says how one is written."""

from __future__ import annotations

from qwen2_npu.emulator.ge.operators import arithmetic, attention, movement, shapes
from qwen2_npu.emulator.ge.operators.table import IN_PLACE, TABLE, Operator, find

__all__ = ["IN_PLACE", "TABLE", "Operator", "arithmetic", "attention", "find", "movement", "shapes"]
