"""What torch_npu's own operators mean, as functions of CPU tensors: one table per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwen2_npu.emulator.eager.operators import (
    activation,
    convolution,
    dropout,
    fusion_attention,
    fusion_attention_out,
    indexing,
    inference_attention,
    linear,
    losses,
    movement,
    normalization,
    optimizers,
    quantization,
    recurrent,
    rotary,
    routing,
    spectral,
    synchronized_norm,
)

TABLE: dict[str, Callable[..., Any]] = {}
"""Operator name, with its overload where it has one -> function."""

for family in (
    activation,
    convolution,
    dropout,
    fusion_attention,
    fusion_attention_out,
    indexing,
    inference_attention,
    linear,
    losses,
    movement,
    normalization,
    optimizers,
    quantization,
    recurrent,
    rotary,
    routing,
    spectral,
    synchronized_norm,
):
    twice = TABLE.keys() & family.TABLE.keys()
    assert not twice, f"{family.__name__} has {sorted(twice)} again"
    TABLE.update(family.TABLE)
