"""GE operators that neither Qwen2 nor the collectives of its graphs reach.

They are for every other program that torchair lowers under ``qwen2-npu emulate``: vision, other activations and norms,
losses, random numbers in graphs.
"""

from __future__ import annotations

from qwen2_npu.emulator.ge.operators.beyond_qwen2 import (  # noqa: F401 - each enters its operators
    activations,
    convolutions,
    images,
    losses,
    normalization,
    padding,
    random,
)
