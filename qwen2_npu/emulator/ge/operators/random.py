"""GE operators that draw random numbers from a seed and an offset. Hardware's numbers are other ones."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.ge.operators.table import Ints, Scalar, Tensor, operator
from qwen2_npu.emulator.ge.proto import attribute_dtype

_MIX = 0x9E3779B97F4A7C15


def _generator(seed: int, offset: int) -> torch.Generator:
    mixed = (seed + offset * _MIX) & ((1 << 64) - 1)
    return torch.Generator().manual_seed(mixed if mixed < 1 << 63 else mixed - (1 << 64))


@operator("StatelessRandomUniformV2")
def random_uniform(shape: Ints, key: Ints, counter: Ints, alg: Ints, *, dtype: int = 0) -> Tensor:
    return torch.rand(shape, generator=_generator(key[0], counter[-1])).to(attribute_dtype(dtype))


@operator("StatelessRandomNormalV2")
def random_normal(shape: Ints, key: Ints, counter: Ints, alg: Ints, *, dtype: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(key[0], counter[-1])).to(attribute_dtype(dtype))


@operator("StatelessBernoulli")
def bernoulli(shape: Ints, prob: Tensor, seed: Scalar, offset: Scalar, *, dtype: int = 0) -> Tensor:
    drawn = torch.rand(shape, generator=_generator(int(seed), int(offset)))
    return (drawn < prob).to(attribute_dtype(dtype))


@operator("MultinomialWithReplacement")
def multinomial(x: Tensor, seed: Scalar, offset: Scalar, *, numsamples: int, replacement: bool = False) -> Tensor:
    # The flag is at its default even where torch asks for replacement: torchair does not pass it on.
    return torch.multinomial(x, numsamples, True, generator=_generator(int(seed), int(offset)))


@operator("StatelessDropOutGenMask")
def dropout_mask(shape: Ints, prob: Scalar, seed: Scalar, seed1: Scalar, offset: Ints | None) -> Tensor:
    # One bit per element, in bytes, in chunks of 128 bits as hardware lays them out.
    count = 1
    for size in shape:
        count *= size
    drawn = torch.rand(count, generator=_generator(int(seed), offset[-1] if offset else 0)) < prob
    bits = torch.zeros((count + 127) // 128 * 128, dtype=torch.uint8)
    bits[:count] = drawn
    weights = 2 ** torch.arange(8, dtype=torch.int32)
    return (bits.reshape(-1, 8).int() * weights).sum(1).to(torch.uint8)


@operator("DropOutDoMask")
def dropout_apply(x: Tensor, mask: Tensor, keep_prob: Scalar) -> Tensor:
    weights = torch.arange(8, dtype=torch.int32)
    bits = (mask.int()[:, None] >> weights) & 1
    kept = bits.reshape(-1)[: x.numel()].reshape(x.shape).bool()
    return torch.where(kept, x / keep_prob, torch.zeros((), dtype=x.dtype))
