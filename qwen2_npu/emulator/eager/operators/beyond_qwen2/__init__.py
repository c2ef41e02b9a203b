"""torch_npu's operators that neither Qwen2 nor its training nor DeepSpeed reach.

They are for every other program under ``qwen2-npu emulate``: other models, other kinds of attention and experts,
vision, speech, quantised weights, torch_npu's own optimizers.
"""

from __future__ import annotations

from qwen2_npu.emulator.eager.operators.beyond_qwen2 import (
    activation,
    convolution,
    indexing,
    losses,
    normalization,
    optimizers,
    quantization,
    recurrent,
    rotary,
    routing,
    spectral,
    synchronized_norm,
    token_permutation,
)

FAMILIES = (
    activation,
    convolution,
    indexing,
    losses,
    normalization,
    optimizers,
    quantization,
    recurrent,
    rotary,
    routing,
    spectral,
    synchronized_norm,
    token_permutation,
)
