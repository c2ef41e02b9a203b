"""Int8 and int4 operators against integer arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch_npu

from tests.unit.emulator.eager.operators.harness import draw


def integers(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("divide", [True, False])
def test_quantize(divide, axis):
    x, scales = draw(4, 4, grad=False) * 20, torch.tensor([0.5, 1.0, 2.0, 0.1])
    points = torch.tensor([0.0, 3.0, -3.0, 0.0])
    found = torch_npu.npu_quantize(x.npu(), scales.npu(), points.npu(), torch.qint8, axis, divide)
    scales, points = (value if axis else value.unsqueeze(1) for value in (scales, points))
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


def unpacked(packed):
    """int4 numbers of int32, eight each, the first in the lowest bits."""
    words = packed.cpu().numpy().astype("int64")
    nibbles = [(words >> shift) & 15 for shift in range(0, 32, 4)]
    signed = [nibble - 16 * (nibble > 7) for nibble in nibbles]
    return torch.from_numpy(np.stack(signed, -1).reshape(*packed.shape[:-1], -1))


GROUPS = torch.tensor([2, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize("scaling", ["none", "smooth", "groups"])
@pytest.mark.parametrize("dst_type", [None, torch.int8, torch.quint4x2], ids=str)
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16)], ids=["2d", "3d"])
@pytest.mark.parametrize("name", ["npu_dynamic_quant", "npu_dynamic_quant_asymmetric"])
def test_dynamic_quant(name, shape, dst_type, scaling):
    x = draw(*shape, dtype=torch.float16, grad=False)
    smooth = {"none": None, "smooth": torch.rand(16).half() + 0.5, "groups": torch.rand(3, 16).half() + 0.5}[scaling]
    index = GROUPS if scaling == "groups" else None
    more = {} if dst_type is None else {"dst_type": dst_type}
    given = {
        key: None if value is None else value.npu()
        for key, value in (("smooth_scales", smooth), ("group_index", index))
    }
    y, scale, *offset = getattr(torch_npu, name)(x.npu(), **given, **more)

    wide = x.double().view(-1, 16)
    if scaling == "smooth":
        wide = wide * smooth.double()
    if scaling == "groups":
        for group, (first, last) in enumerate([(0, 2), (2, 2), (2, 5)]):
            wide[first:last] *= smooth[group].double()
    largest = 7 if dst_type is torch.quint4x2 else 127
    if offset:
        wanted = (wide.amax(-1) - wide.amin(-1)) / (2 * largest + 1)
        shift = largest - wide.amax(-1) / wanted
        torch.testing.assert_close(offset[0].cpu().double().view(-1), shift, rtol=1e-5, atol=1e-4)
    else:
        wanted, shift = wide.abs().amax(-1) / largest, torch.zeros(len(wide), dtype=torch.float64)
    assert scale.shape == shape[:-1]
    torch.testing.assert_close(scale.cpu().double().view(-1), wanted, rtol=1e-5, atol=0)
    if dst_type is torch.quint4x2:
        assert (y.dtype, y.shape) == (torch.int32, (*shape[:-1], 2))
        y = unpacked(y)
    else:
        assert (y.dtype, y.shape) == (torch.int8, shape)
    exact = wide / wanted.unsqueeze(-1) + shift.unsqueeze(-1)
    # Rounding has one answer except next to a half, where float32 may differ from float64.
    assert (y.cpu().double().view(-1, 16) - exact).abs().max() <= 0.501


@pytest.mark.parametrize("name", ["npu_dynamic_quant", "npu_dynamic_quant_asymmetric"])
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_constant_rows(name, value):
    y, scale, *offset = getattr(torch_npu, name)(torch.full((2, 8), value).half().npu())
    back = (y.cpu().double() - (offset[0].cpu().double().unsqueeze(-1) if offset else 0)) * scale.cpu().unsqueeze(-1)
    if not offset:
        torch.testing.assert_close(back, torch.full((2, 8), value).double(), rtol=1e-6, atol=0)
    assert torch.isfinite(back).all()


@pytest.mark.parametrize(
    ("shape", "arguments", "error", "message"),
    [
        ((2, 12), {"dst_type": torch.quint4x2}, ValueError, "last dimension divisible by 8, not 12"),
        ((2, 8), {"group_index": GROUPS}, ValueError, "group_index needs smooth_scales"),
        ((2, 8), {"dst_type": torch.float16}, NotImplementedError, "float16.* is not emulated; int8 and int4 are"),
        ((2, 8), {"quant_mode": "pertensor"}, NotImplementedError, "quant_mode='pertensor' is not emulated"),
        ((2, 8), {"dst_type_max": 15.0}, NotImplementedError, "dst_type_max is not emulated"),
    ],
)
def test_what_dynamic_quant_does_not_take(shape, arguments, error, message):
    given = {key: value.npu() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    with pytest.raises(error, match=message):
        torch_npu.npu_dynamic_quant(torch.ones(shape).half().npu(), **given)


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


@pytest.mark.parametrize("kind", [torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("shift", [None, 3.0])
def test_int8_results_of_quant_matmul(shift, kind):
    """An integer bias is added before the scale, another one after it; the offset comes last."""
    x1, x2, scale = integers(3, 16), integers(16, 5, seed=1), torch.linspace(1e-3, 3e-3, 5)
    bias = (torch.arange(-2, 3) * (500 if kind is torch.int32 else 2)).to(kind)
    offset = None if shift is None else torch.full((5,), shift)
    found = torch_npu.npu_quant_matmul(
        x1.npu(), x2.npu(), scale.npu(), offset=None if offset is None else offset.npu(), bias=bias.npu()
    )
    product = (x1.long() @ x2.long()).double()
    exact = (product + bias) * scale.double() if kind is torch.int32 else product * scale.double() + bias.double()
    exact = exact + (shift or 0.0)
    assert found.dtype is torch.int8
    assert (found.cpu().double() - exact.clamp(-128, 127)).abs().max() <= 0.501


@pytest.mark.parametrize(("group", "keys"), [(0, 64), (32, 64), (32, 80)])
def test_weight_quant_batchmatmul(group, keys):
    """The last group may be a part of one."""
    x, weight = draw(3, keys, dtype=torch.float16, grad=False), integers(keys, 5)
    shape = (-(-keys // group), 5) if group else (1, 5)
    scale, offset = (torch.rand(shape, generator=torch.Generator().manual_seed(n)).half() * 0.01 for n in (1, 2))
    spread = (lambda value: value.double().repeat_interleave(32, 0)[:keys]) if group else torch.Tensor.double
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
