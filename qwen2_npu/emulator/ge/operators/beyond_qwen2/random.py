"""GE operators that draw random numbers from a seed and an offset. Hardware draws other numbers."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.eager.operators.dropout import keep_mask, pack, unpack
from qwen2_npu.emulator.eager.random import seeded
from qwen2_npu.emulator.ge.operators.table import Ints, Scalar, Tensor, operator
from qwen2_npu.emulator.ge.proto import attribute_dtype


@operator("StatelessRandomUniformV2")
def random_uniform(shape: Ints, key: Ints, counter: Ints, alg: Ints, *, dtype: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(key[0], counter[-1])).to(attribute_dtype(dtype))


@operator("StatelessRandomNormalV2")
def random_normal(shape: Ints, key: Ints, counter: Ints, alg: Ints, *, dtype: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(key[0], counter[-1])).to(attribute_dtype(dtype))


@operator("StatelessBernoulli")
def bernoulli(shape: Ints, prob: Tensor, seed: Scalar, offset: Scalar, *, dtype: int = 0) -> Tensor:
    drawn = torch.rand(shape, generator=seeded(int(seed), int(offset)))
    return (drawn < prob).to(attribute_dtype(dtype))


@operator("MultinomialWithReplacement")
def multinomial(x: Tensor, seed: Scalar, offset: Scalar, *, numsamples: int, replacement: bool = False) -> Tensor:
    # The flag is at its default even where torch asks for replacement: torchair does not pass it on.
    return torch.multinomial(x, numsamples, True, generator=seeded(int(seed), int(offset)))


@operator("StatelessDropOutGenMask")
def dropout_mask(shape: Ints, prob: Scalar, seed: Scalar, seed1: Scalar, offset: Ints | None) -> Tensor:
    return pack(keep_mask(shape, float(prob), seeded(int(seed), offset[-1] if offset else 0)))


@operator("DropOutDoMask")
def dropout_apply(x: Tensor, mask: Tensor, keep_prob: Scalar) -> Tensor:
    return torch.where(unpack(mask, x.shape), x / keep_prob, torch.zeros((), dtype=x.dtype))
