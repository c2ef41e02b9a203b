"""Gather, scatter, reductions with indices."""

from __future__ import annotations

import pytest
import torch

from tests.unit.emulator.eager.operators.harness import check, draw

npu = torch.ops.npu


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("keepdim", [False, True])
def test_reductions_with_index(name, keepdim):
    def formula(x, dim, keepdim):
        values, indices = getattr(x, name)(dim, keepdim)
        return values, indices.int()

    check(getattr(npu, f"npu_{name}").dim, formula, draw(3, 5), 1, keepdim, differentiate=[0], meta=False)


def test_gather_sparse_index():
    index = torch.tensor([[0, 2], [2, 1]])
    check(npu.npu_gather_sparse_index, lambda x, index: x[index], draw(4, 3), index, differentiate=[0], meta=False)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize("repeats", [2, torch.tensor([3])], ids=["number", "tensor"])
def test_the_gradient_of_repeat_interleave(repeats, dim):
    x = draw(3, 4)
    if isinstance(repeats, torch.Tensor):
        repeats = torch.arange(x.numel() if dim is None else x.shape[dim])  # another number for each
    check(torch.repeat_interleave, torch.repeat_interleave, x, repeats, dim, differentiate=[0], meta=False)


def test_index_add():
    index, source = torch.tensor([0, 2, 0]), draw(3, 4, seed=1, grad=False)

    def formula(x, index, source, alpha):
        out = x.clone()
        for row, addend in zip(index.tolist(), source, strict=True):
            out[row] += alpha * addend
        return out

    check(npu._npu_index_add, formula, draw(3, 4, grad=False), index, source, alpha=2)
    x = draw(3, 4, grad=False).npu()
    wanted = npu._npu_index_add(x, index.npu(), source.npu(), alpha=2)
    assert npu._npu_index_add_(x, index.npu(), source.npu(), alpha=2) is x
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_scatter(axis):
    def formula(x, indices, updates, dim):
        out = x.clone()
        for row, (column, value) in enumerate(zip(indices.tolist(), updates, strict=True)):
            out[(row, column) if dim else (column, row)] = value
        return out

    indices, x = torch.tensor([1, 0, 3], dtype=torch.int32), draw(*((3, 4) if axis else (4, 3)), grad=False)
    check(npu.npu_scatter, formula, x, indices, draw(3, seed=1, grad=False), axis, meta=False)


def test_scatter_nd_update():
    indices, updates = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32), draw(2, 5, seed=1, grad=False)

    def formula(x, indices, updates):
        out = x.clone()
        out[0, 1], out[2, 0] = updates[0], updates[1]
        return out

    check(npu.npu_scatter_nd_update, formula, draw(3, 2, 5, grad=False), indices, updates)
    x = draw(3, 2, 5, grad=False).npu()
    expected = formula(x.cpu(), indices, updates)
    assert npu.npu_scatter_nd_update_(x, indices.npu(), updates.npu()) is x
    assert torch.equal(x.cpu(), expected)


def test_one_hot():
    found = npu.npu_one_hot(torch.tensor([2, 0], dtype=torch.int32).npu(), depth=3, on_value=5, off_value=1)
    assert found.tolist() == [[1, 1, 5], [5, 1, 1]]


@pytest.mark.parametrize("axis", [0, 1])
def test_masked_fill_range(axis):
    start, end = (torch.tensor(values, dtype=torch.int32).npu() for values in ([0, 3], [2, 4]))
    x = torch.zeros(2, 5).transpose(0, 1 - axis).npu()
    found = npu.npu_masked_fill_range(x, start, end, torch.tensor([7.0, 9.0]).npu(), axis)
    assert found.transpose(0, 1 - axis).tolist() == [[7, 7, 0, 9, 0]] * 2


def test_sort_v2():
    check(
        npu.npu_sort_v2,
        lambda x, dim, descending: x.sort(dim, descending).values,
        draw(4, 5, grad=False),
        0,
        True,
        meta=False,
    )
    x = draw(4, 5, grad=False).npu()
    out = torch.empty_like(x)
    assert torch.equal(npu.npu_sort_v2.out(x, 0, True, out=out), x.sort(0, True).values)
