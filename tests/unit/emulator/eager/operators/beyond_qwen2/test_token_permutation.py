"""npu_moe_token_permute and _unpermute against loops over tokens and their choices, in float64."""

from __future__ import annotations

import pytest
import torch

from tests.unit.emulator.eager.operators.harness import check, close, draw

npu = torch.ops.npu

TOKENS, HIDDEN, EXPERTS = 6, 5, 4


def experts(top: int) -> torch.Tensor:
    shape = (TOKENS,) if top == 1 else (TOKENS, top)
    return torch.randint(0, EXPERTS, shape, generator=torch.Generator().manual_seed(top))


def places(indices: torch.Tensor) -> list[int]:
    """For each choice, its row among those sorted by expert, in the order of the choices within one expert."""
    flat = indices.reshape(-1).tolist()
    return [
        sum(other < mine or (other == mine and at < i) for at, other in enumerate(flat)) for i, mine in enumerate(flat)
    ]


def permuted(tokens, indices, rows=None):
    """By a loop over the choices: (rows in the order of the experts, the row of each choice)."""
    found = places(indices)
    top = len(found) // tokens.shape[0]
    order = sorted(range(len(found)), key=found.__getitem__)
    return torch.stack([tokens[choice // top] for choice in order])[:rows], torch.tensor(found, dtype=torch.int32)


def put_back(rows, sorted_indices, probs=None):
    top = 1 if probs is None else probs.shape[1]
    out = []
    for token in range(sorted_indices.numel() // top):
        total = 0
        for j in range(top):
            row = int(sorted_indices[token * top + j])
            if row < rows.shape[0]:
                total = total + rows[row] * (1 if probs is None else probs[token, j])
        out.append(total if isinstance(total, torch.Tensor) else torch.zeros(rows.shape[1], dtype=rows.dtype))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [1, 3])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_permute_and_its_gradient(top, dtype, index_dtype):
    check(
        npu.npu_moe_token_permute,
        permuted,
        draw(TOKENS, HIDDEN, dtype=dtype),
        experts(top).to(index_dtype),
        differentiate=[0],
    )


@pytest.mark.parametrize(("asked", "rows"), [(0, None), (7, 7), (100, None), (-4, -4)])
def test_rows_are_dropped(asked, rows):
    def formula(tokens, indices, _):
        return permuted(tokens, indices, rows)

    check(npu.npu_moe_token_permute, formula, draw(TOKENS, HIDDEN), experts(3), asked, differentiate=[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [None, 1, 3])
def test_unpermute_and_its_gradients(top, dtype):
    rows = draw(TOKENS * (top or 1), HIDDEN, dtype=dtype)
    sorted_indices = torch.tensor(places(experts(top or 1)), dtype=torch.int32)
    arguments = [rows, sorted_indices]
    if top is not None:
        arguments.append(torch.softmax(draw(TOKENS, top, grad=False), -1).to(dtype).requires_grad_())
    check(npu.npu_moe_token_unpermute, put_back, *arguments, differentiate=[0])


@pytest.mark.parametrize(("dtype", "of_probs"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_gradient_has_the_dtype_of_what_it_is_by_and_uses_the_values_of_the_forward_pass(dtype, of_probs):
    """Also where the rows are overwritten between the two passes."""
    sorted_indices = torch.tensor(places(experts(3)), dtype=torch.int32)
    rows, probs = draw(TOKENS * 3, HIDDEN, dtype=dtype, grad=False), draw(TOKENS, 3, grad=False).to(of_probs)
    leaves = [value.double().requires_grad_() for value in (rows, probs)]
    wanted = torch.autograd.grad(put_back(leaves[0], sorted_indices, leaves[1]).sum(), leaves)
    there, by = rows.npu().requires_grad_(), probs.npu().requires_grad_()
    out = npu.npu_moe_token_unpermute(there, sorted_indices.npu(), by)
    assert out.dtype is dtype
    there.data.zero_()
    found = torch.autograd.grad(out.sum(), [there, by])
    assert [value.dtype for value in found] == [dtype, of_probs]
    for one, other, kind in zip(found, wanted, (dtype, of_probs), strict=True):
        torch.testing.assert_close(one.cpu(), other.to(kind))


def test_dropped_rows_count_as_zeros():
    rows, probs = draw(7, HIDDEN), torch.softmax(draw(TOKENS, 3, grad=False), -1).requires_grad_()
    sorted_indices = torch.tensor(places(experts(3)), dtype=torch.int32)
    check(npu.npu_moe_token_unpermute, put_back, rows, sorted_indices, probs, differentiate=[0])


def test_there_and_back_is_the_identity():
    tokens = draw(TOKENS, HIDDEN, grad=False)
    rows, sorted_indices = npu.npu_moe_token_permute(tokens.npu(), experts(2).npu())
    probs = torch.full((TOKENS, 2), 0.5).npu()
    assert torch.equal(npu.npu_moe_token_unpermute(rows, sorted_indices, probs).cpu(), tokens)


def test_gradients_by_their_own_names():
    """Those of older releases give what the ones that autograd calls give."""
    tokens, indices = draw(TOKENS, HIDDEN, grad=False), experts(3)
    rows, sorted_indices = npu.npu_moe_token_permute(tokens.npu(), indices.npu())
    grad = draw(*rows.shape, grad=False, seed=1)
    leaf = tokens.double().requires_grad_()
    wanted = torch.autograd.grad(permuted(leaf, indices)[0], leaf, grad.double())[0]
    found = npu.npu_moe_token_permute_grad(tokens.npu(), grad.npu(), indices.npu(), sorted_indices)
    close(found, wanted, "npu_moe_token_permute_grad")

    probs, grad = draw(TOKENS, 3, seed=2, grad=False), draw(TOKENS, HIDDEN, seed=3, grad=False)
    leaves = [value.double().requires_grad_() for value in (rows.cpu(), probs)]
    wanted = torch.autograd.grad(put_back(leaves[0], sorted_indices, leaves[1]), leaves, grad.double())
    found = npu.npu_moe_token_unpermute_grad(rows, grad.npu(), sorted_indices, probs.npu())
    close(list(found), list(wanted), "npu_moe_token_unpermute_grad")


def test_padded_mode_is_refused():
    x, indices = torch.ones(2, 2).npu(), torch.zeros(2, dtype=torch.int32).npu()
    with pytest.raises(NotImplementedError, match="padded_mode=True is not supported"):
        npu.npu_moe_token_permute(x, indices, None, True)
    with pytest.raises(NotImplementedError, match="restore_shape belongs to padded_mode"):
        npu.npu_moe_token_unpermute(x, indices, None, False, [2, 2])
