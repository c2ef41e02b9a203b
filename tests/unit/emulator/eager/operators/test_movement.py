"""Casts, formats and reorderings: exact."""

from __future__ import annotations

import pytest
import torch
import torch_npu

from tests.unit.emulator.eager.operators.harness import check, draw

npu = torch.ops.npu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.float32])
@pytest.mark.parametrize("cast", [torch_npu.npu_dtype_cast, torch_npu._npu_dtype_cast], ids=["public", "inner"])
def test_cast(cast, dtype):
    """A tensor of its own, where nothing changes, too."""
    x = (draw(4, grad=False) * 5).npu()
    found = cast(x, dtype)
    assert found.dtype is dtype
    assert torch.equal(found.cpu(), x.cpu().to(dtype))
    assert found.data_ptr() != x.data_ptr()


def test_cast_has_a_gradient_in_the_dtype_of_its_input():
    x = draw(4).npu().detach().requires_grad_()
    torch_npu._npu_dtype_cast(x, torch.bfloat16).float().square().sum().backward()
    assert x.grad.dtype is torch.float32
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=2**-7, atol=0)


def test_formats_keep_the_values():
    x = draw(16, 32, grad=False).npu()
    found = torch_npu.npu_format_cast(x, 29)
    assert torch.equal(found, x)
    assert found.data_ptr() != x.data_ptr()
    assert torch.equal(torch_npu.npu_format_cast_(found, x + 1), x + 1)


@pytest.mark.parametrize("first", [True, False])
def test_confusion_transpose_and_its_gradient(first):
    # No permutation that is its own inverse.
    perm, shape = [1, 2, 0], [3, 8] if first else [2, 4, 3]
    x = draw(2, 3, 4) if first else draw(2, 12)

    def formula(x, perm, shape, first):
        return x.permute(perm).reshape(shape) if first else x.reshape(shape).permute(perm)

    check(npu.npu_confusion_transpose, formula, x, perm, shape, first, differentiate=[0], meta=False)


@pytest.mark.parametrize(
    ("operator", "arguments", "formula"),
    [
        (npu.npu_reshape, ([6, 4],), lambda x, shape: x.reshape(shape)),
        (npu.npu_transpose, ([2, 0, 1],), lambda x, perm: x.permute(perm)),
        (npu.npu_slice, ([0, 1, 0], [2, 2, -1]), lambda x, offsets, size: x[0:2, 1:3, :]),
        (npu.npu_indexing, ([0, 0, 1], [2, 3, 4], [1, 2, 2]), lambda x, *_: x[0:2:1, 0:3:2, 1:4:2]),
        (npu.npu_indexing, ([1, 1, 1], [2, 2, 2], [1, 1, 1], 0b001, 0b100), lambda x, *_: x[:2, 1:2, 1:]),
        (npu.npu_pad, ([1, 0, 0, 2, 1, 1],), lambda x, _: torch.nn.functional.pad(x, [1, 1, 0, 2, 1, 0])),
        (npu.npu_stride_copy, ([3, 2], [1, 4], 2), lambda x, *_: x.reshape(-1).as_strided([3, 2], [1, 4], 2)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_reorderings(operator, arguments, formula):
    check(operator, formula, draw(2, 3, 4, grad=False), *arguments, meta=False)


def test_broadcast():
    check(npu.npu_broadcast, lambda x, size: x.expand(size), draw(3, 1, grad=False), [2, 3, 4], meta=False)


def test_out_variant_takes_the_shape():
    x = draw(2, 3, grad=False).npu()
    out = torch.empty(0, device="npu")
    assert npu.npu_transpose.out(x, [1, 0], out=out) is out
    assert torch.equal(out, x.t())


def test_copies_in_place():
    x, y = torch.zeros(3).npu(), draw(3, grad=False).npu()
    npu.npu_view_copy(x, y, False)
    assert torch.equal(x, y)
    npu.copy_memory_(x, torch.ones(3).npu())
    assert torch.equal(npu.one_(y), x)


def test_masks_of_strided_slices_are_refused():
    with pytest.raises(NotImplementedError, match="only begin_mask and end_mask"):
        npu.npu_indexing(draw(2, 3, grad=False).npu(), [0], [1], [1], 0, 0, 1)
