"""Rotary embedding and its gradients."""

from __future__ import annotations

import pytest
import torch

from tests.unit.emulator.eager.operators.harness import check, draw

npu = torch.ops.npu


def rotated(x, mode):
    out = torch.empty_like(x)
    if mode == "half":
        half = x.shape[-1] // 2
        out[..., :half], out[..., half:] = -x[..., half:], x[..., :half]
    else:
        out[..., ::2], out[..., 1::2] = -x[..., 1::2], x[..., ::2]
    return out


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul(mode):
    def formula(x, cos, sin, mode):
        return x * cos + rotated(x, mode) * sin

    check(
        npu.npu_rotary_mul,
        formula,
        draw(2, 3, 4, 8),
        draw(1, 3, 1, 8),
        draw(1, 3, 1, 8, seed=1),
        mode,
        differentiate=[0],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleave_rope(dtype):
    """In halves the sum is rounded, not its terms."""

    def formula(x, cos, sin):
        x = torch.cat([x[..., ::2], x[..., 1::2]], -1)
        return x * cos + rotated(x, "half") * sin

    shapes = (1, 2, 3, 64), (1, 1, 3, 64), (1, 1, 3, 64)
    arguments = [draw(*shape, seed=seed, dtype=dtype, grad=False) for seed, shape in enumerate(shapes)]
    check(npu.npu_interleave_rope, formula, *arguments)
