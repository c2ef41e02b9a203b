"""Int8 operators against integer arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch_npu

from tests.unit.emulator.eager.operators.harness import draw


def integers(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("divide", [True, False])
def test_quantize(divide):
    x, scales = draw(3, 4, grad=False) * 20, torch.tensor([0.5, 1.0, 2.0, 0.1])
    points = torch.tensor([0.0, 3.0, -3.0, 0.0])
    found = torch_npu.npu_quantize(x.npu(), scales.npu(), points.npu(), torch.qint8, 1, divide)
    exact = x.double() / scales.double() if divide else x.double() * scales.double()
    # Exact halves apart, rounding has one answer; float32 may differ from float64 next to a half.
    assert (found.cpu().double() - (exact + points).clamp(-128, 127)).abs().max() <= 0.5001
    assert found.dtype is torch.int8


def test_dynamic_quant_gives_back_the_rows():
    x = draw(5, 16, dtype=torch.float16, grad=False)
    y, scale = torch_npu.npu_dynamic_quant(x.npu())
    assert (y.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (5,))
    assert y.cpu().abs().amax(-1).tolist() == [127] * 5
    back = y.cpu().double() * scale.cpu().double().unsqueeze(-1)
    assert ((back - x.double()).abs() <= scale.cpu().double().unsqueeze(-1) * 0.5001).all()


def test_quant_matmul():
    x1, x2, scale = integers(3, 64), integers(64, 5, seed=1), torch.rand(5) * 1e-3
    token, bias = torch.rand(3), torch.randint(-1000, 1000, (5,), dtype=torch.int32)
    exact = (x1.long() @ x2.long() + bias).double()
    found = torch_npu.npu_quant_matmul(
        x1.npu(), x2.npu(), scale.npu(), pertoken_scale=token.npu(), bias=bias.npu(), output_dtype=torch.float16
    )
    expected = exact * scale.double() * token.double().unsqueeze(-1)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2**-10, atol=1e-3)
    whole = torch_npu.npu_quant_matmul(x1.npu(), x2.npu(), scale.npu(), bias=bias.npu(), output_dtype=torch.int32)
    assert torch.equal(whole.cpu().long(), exact.long())


@pytest.mark.parametrize("group", [0, 32])
def test_weight_quant_batchmatmul(group):
    x, weight = draw(3, 64, dtype=torch.float16, grad=False), integers(64, 5)
    shape = (2, 5) if group else (1, 5)
    scale, offset = (torch.rand(shape, generator=torch.Generator().manual_seed(n)).half() * 0.01 for n in (1, 2))
    spread = (lambda value: value.double().repeat_interleave(32, 0)) if group else torch.Tensor.double
    wide = ((weight.double() + spread(offset)) * spread(scale)).half().double()
    found = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(), weight.npu(), scale.npu(), offset.npu(), antiquant_group_size=group
    )
    torch.testing.assert_close(found.cpu().double(), x.double() @ wide, rtol=2**-9, atol=2**-9)


def test_anti_quant():
    x, scale, offset = integers(3, 4), torch.rand(4), torch.rand(4)
    found = torch_npu.npu_anti_quant(x.npu(), scale.npu(), offset=offset.npu(), dst_dtype=torch.float16)
    expected = (x.double() + offset.double()) * scale.double()
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2**-10, atol=2**-10)


def test_int4_is_refused():
    with pytest.raises(NotImplementedError, match="int32"):
        torch_npu.npu_quant_matmul(*(torch.ones(8, 8, dtype=torch.int32).npu() for _ in range(2)), torch.ones(8).npu())
