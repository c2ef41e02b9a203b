"""Dropout: the share that is dropped, its scale, the same mask backward, and draws from the card's generator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen2_npu.emulator.eager.operators.dropout import pack, unpack

npu = torch.ops.npu

P = 0.3


@pytest.mark.parametrize("count", [1, 127, 128, 129, 1000])
def test_masks_are_packed_and_unpacked(count):
    mask = torch.rand(count) < 0.5
    packed = pack(mask)
    assert packed.dtype is torch.uint8
    assert packed.numel() == -(-count // 128) * 16
    assert torch.equal(unpack(packed, (count,)), mask)


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: F.dropout(x, P),
        lambda x: npu._npu_dropout(x, P)[0],
        lambda x: npu._dropout_with_byte_mask(x, P)[0],
        lambda x: torch.native_dropout(x, P, True)[0],
    ],
    ids=["functional", "bits", "bytes", "native"],
)
def test_dropout_and_its_gradient(drop):
    torch.npu.manual_seed(1)
    x = torch.ones(4000, device="npu", requires_grad=True)
    y = drop(x)
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - P)) < 0.03
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - P)))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.npu.manual_seed(1)
    assert torch.equal(drop(x), y)
    assert not torch.equal(drop(x), y)


def test_evaluation_draws_nothing():
    state = torch.npu.get_rng_state()
    x = torch.ones(10, device="npu")
    assert torch.equal(F.dropout(x, P, training=False), x)
    assert torch.equal(torch.npu.get_rng_state(), state)


@pytest.mark.parametrize("dim", [-1, 1])
def test_dropout_with_add_softmax(dim):
    torch.npu.manual_seed(1)
    x, x1 = (torch.randn(2, 3, 4, 8, device="npu", requires_grad=True) for _ in range(2))
    mask, soft, out = npu.npu_dropout_with_add_softmax(x, x1, 0.5, P, dim)
    torch.testing.assert_close(soft, torch.softmax(x1 + 0.5 * x, dim))
    keep = unpack(mask.cpu(), out.shape).npu()
    torch.testing.assert_close(out, torch.where(keep, soft / (1 - P), 0))
    weights = torch.linspace(-1, 1, out.numel(), device="npu").view_as(out)
    found = torch.autograd.grad((out * weights).sum(), [x, x1])
    expected = torch.autograd.grad((torch.softmax(x1 + 0.5 * x, dim) * keep / (1 - P) * weights).sum(), [x, x1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_a_softmax_is_taken_of_is_added_in_fp32():
    # 100.2 is 100 in bfloat16.
    x, x1 = (torch.tensor([row], dtype=torch.bfloat16).npu() for row in ([0.2, 0.0], [100.0, 100.0]))
    soft = npu.npu_dropout_with_add_softmax(x, x1, 1.0, 0.0, -1)[1]
    wanted = torch.softmax(x1.cpu().float() + x.cpu().float(), -1).bfloat16()
    assert torch.equal(soft.cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.bool, torch.float32])
def test_a_masked_scale_has_the_dtype_of_what_it_scales_and_is_rounded_once(dtype, mask_dtype):
    x, scale = torch.linspace(-3, 3, 64).to(dtype), 1 / 0.7
    mask = (torch.arange(64) % 3 > 0).to(mask_dtype)
    found = torch.ops.aten._masked_scale(x.npu(), mask.npu(), scale)
    wanted = torch.where(mask.bool(), x.double() * scale, 0)
    assert found.dtype is dtype
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=0)
