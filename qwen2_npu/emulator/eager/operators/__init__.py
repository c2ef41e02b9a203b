"""What torch_npu's own operators mean, as functions of CPU tensors: one table per family.

Here are the families that Qwen2, its training and DeepSpeed reach; all others are in ``beyond_qwen2``. An operator
that no table has is computed by ``qwen2_npu.ops`` or by PyTorch's own CPU kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from qwen2_npu.emulator.eager.operators import (
    accepted,
    beyond_qwen2,
    dropout,
    fusion_attention,
    fusion_attention_out,
    halves,
    inference_attention,
    linear,
    movement,
)


def merged(families: Iterable[ModuleType]) -> dict[str, Callable[..., Any]]:
    """The tables of ``families`` as one, in which no operator may be twice."""
    table: dict[str, Callable[..., Any]] = {}
    for family in families:
        twice = table.keys() & family.TABLE.keys()
        assert not twice, f"{family.__name__} has {sorted(twice)} again"
        table.update(family.TABLE)
    return table


TABLE = merged(
    (
        *(accepted, dropout, fusion_attention, fusion_attention_out, halves, inference_attention, linear, movement),
        *beyond_qwen2.FAMILIES,
    )
)
"""Operator name, with its overload where it has one -> function."""
