"""Products of matrices."""

from __future__ import annotations

import pytest
import torch

from tests.unit.emulator.eager.operators.harness import check, draw

npu = torch.ops.npu


def test_linear():
    def formula(x, weight, bias):
        return x @ weight.T + bias

    check(npu.npu_linear, formula, draw(3, 4), draw(5, 4), draw(5), differentiate=[0], meta=False)


@pytest.mark.parametrize("shapes", [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((4,), (4, 5)), ((2, 1, 3, 4), (6, 4, 5))])
def test_matmul_differentiated_twice(shapes):
    def second(a, b):
        first = torch.autograd.grad((a @ b).square().sum(), [a, b], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [a, b])

    a, b = (draw(*shape) for shape in shapes)
    expected = second(a.double(), b.double())
    found = second(*(x.detach().npu().requires_grad_() for x in (a, b)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-3)


def test_bmm():
    a, b = draw(2, 3, 4), draw(2, 4, 5)
    check(npu.npu_bmmV2, lambda a, b, _: a @ b, a, b, [], differentiate=[0], meta=False)


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("", lambda y, x3: y),
        ("add", lambda y, x3: y + x3),
        ("mul", lambda y, x3: y * x3),
        ("relu", lambda y, x3: y.clamp(min=0)),
        ("gelu_erf", lambda y, x3: 0.5 * y * (1 + torch.erf(y / 2**0.5))),
    ],
)
def test_fused_matmul(kind, after):
    def formula(x1, x2, bias, x3, fused_op_type):
        return after(x1 @ x2 + bias, x3)

    a, b, bias, x3 = (draw(*shape, grad=False) for shape in ((3, 4), (4, 5), (5,), (3, 5)))
    check(npu.npu_fused_matmul, formula, a, b, bias=bias, x3=x3, fused_op_type=kind, meta=False)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w, b: npu.npu_fused_matmul(x, w, bias=b),
        lambda x, w, b: npu.npu_fused_matmul(x, w, x3=b.view(1, 1), fused_op_type="add"),
        lambda x, w, b: npu.npu_ffn(x, torch.eye(2).to(x), w, "relu", bias2=b),
        lambda x, w, b: npu.npu_ffn(x, w.expand(2, 2).contiguous(), torch.eye(2).to(x), "relu", bias1=b.expand(2)),
    ],
    ids=["fused", "fused add", "ffn", "ffn, hidden"],
)
def test_what_is_added_to_a_product_is_added_before_it_is_rounded(product):
    # 1 + 2**-9 is 1 in bfloat16.
    x, weight, bias = ([[1.0, 1.0]], [[1.0], [2**-9]], [-1.0])
    found = product(*(torch.tensor(value, dtype=torch.bfloat16).npu() for value in (x, weight, bias)))
    assert found.flatten()[0] == 2**-9


def test_products_with_a_wider_result():
    a, b = (draw(*shape, dtype=torch.bfloat16, grad=False) for shape in ((3, 64), (64, 5)))
    found = torch.mm(a.npu(), b.npu(), out_dtype=torch.float32)
    assert found.dtype is torch.float32
    product = a.double() @ b.double()
    torch.testing.assert_close(found.cpu().double(), product, rtol=1e-5, atol=1e-5)
    bias = draw(3, 5, dtype=torch.bfloat16, grad=False)
    scaled = torch.addmm(bias.npu(), a.npu(), b.npu(), out_dtype=torch.float32, beta=2, alpha=3)
    torch.testing.assert_close(scaled.cpu().double(), 2 * bias.double() + 3 * product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [{"expert_tokens": [1, 2, 2]}, {"expert_tokens_index": [1, 3, 5]}], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu", "swiglu"])
def test_ffn_of_three_experts(activation, rows):
    def formula(x, w1, w2, activation, bias1, bias2, **_):
        acts = {"relu": lambda h: h.clamp(min=0), "silu": torch.nn.functional.silu}
        acts["swiglu"] = lambda h: torch.nn.functional.silu(h[..., :3]) * h[..., 3:]
        experts = zip(x.split([1, 2, 2]), w1, w2, bias1, bias2, strict=True)
        return torch.cat([acts[activation](part @ a + c) @ b + d for part, a, b, c, d in experts])

    hidden = 3 if activation == "swiglu" else 6
    arguments = [draw(*shape, grad=False) for shape in ((5, 4), (3, 4, 6), (3, hidden, 4))]
    check(
        npu.npu_ffn, formula, *arguments, activation, **rows, bias1=draw(3, 6, grad=False), bias2=draw(3, 4, grad=False)
    )


def test_unknown_activation_is_named():
    x = torch.ones(2, 2).npu()
    with pytest.raises(ValueError, match="activation='tanh'; one of relu"):
        npu.npu_ffn(x, x, x, "tanh")


def test_transpose_batchmatmul():
    def formula(x, weight):
        return torch.einsum("bmk,bkn->mbn", x, weight)

    check(npu.npu_transpose_batchmatmul, formula, draw(2, 3, 4, grad=False), draw(2, 4, 5, grad=False), meta=False)
