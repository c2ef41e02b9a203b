"""Numbers in place of tensors, int32 indices and softmax from half to float, as hardware's kernels take them."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

IN_PLACE = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
)


def arguments(dtype: torch.dtype) -> tuple[torch.Tensor, list[object]]:
    """A tensor, and what may stand right of an in-place operator: numbers, a tensor, a tensor of one number."""
    if dtype is torch.bool:
        return torch.tensor([True, False]), [True, False, torch.tensor([False, True]), torch.tensor(True)]
    return torch.tensor([[3], [5], [7]]).to(dtype), [
        2,
        torch.tensor([[1], [2], [3]]).to(dtype),
        torch.tensor(3).to(dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operators(name, dtype):
    function = getattr(operator, name)
    x, others = arguments(dtype)
    for other in others:
        try:
            expected = function(x.clone(), other)
        except (RuntimeError, TypeError):  # not defined for this dtype, on any device
            continue
        on_npu = x.npu()
        found = function(on_npu, other.npu() if isinstance(other, torch.Tensor) else other)
        assert found is on_npu
        assert torch.equal(found.cpu(), expected), f"{name} {other}"


def every_call_with_a_number():
    """PyTorch's overloads that take tensors and numbers."""
    for schema in torch._C._jit_get_all_schemas():
        kinds = [str(argument.type) for argument in schema.arguments]
        if schema.name.startswith("aten::") and "Tensor" in kinds and {"number", "Scalar"} & set(kinds):
            packet = getattr(torch.ops.aten, schema.name[6:], None)
            op = getattr(packet, schema.overload_name or "default", None)
            if op is not None:
                yield op


def example(op: torch._ops.OpOverload, dtype: torch.dtype, device: str) -> tuple[list[object], dict[str, object]]:
    """Arguments for ``op``: the same tensor at every place, small numbers.

    Raises:
        LookupError: it takes arguments of other kinds.
    """
    x = torch.tensor([True, True, False]) if dtype is torch.bool else torch.tensor([3, 2, 1]).to(dtype)
    plain = {"number": True if dtype is torch.bool else 2, "int": 0, "bool": False, "float": 0.5}
    args: list[object] = []
    kwargs: dict[str, object] = {}
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.has_default_value() and kind not in ("Tensor", "number"):
            continue
        value = x.clone().to(device) if kind == "Tensor" else plain[kind]
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


SWEPT = 450
"""Calls that must be compared at least."""

NAN_ELSEWHERE = {"special_zeta"}
"""On the CPU, it depends on the memory next to its arguments for bool."""


@pytest.mark.filterwarnings("ignore")
def test_every_operator_of_tensors_and_numbers():
    found: dict[str, str] = {}
    compared = 0
    for op in every_call_with_a_number():
        for dtype in (torch.int64, torch.bool, torch.float32):
            if op._opname in NAN_ELSEWHERE:
                continue
            try:
                args, kwargs = example(op, dtype, "cpu")
                expected = op(*args, **kwargs)
            except (RuntimeError, LookupError, TypeError, IndexError):
                continue
            if not isinstance(expected, torch.Tensor):
                continue
            compared += 1
            try:
                args, kwargs = example(op, dtype, "npu")
                torch.testing.assert_close(op(*args, **kwargs).cpu(), expected, equal_nan=True)
            except Exception as error:
                found[f"{op} {dtype}"] = str(error).split("\n")[0]
    assert not found
    assert compared >= SWEPT


def test_dtypes_promote_as_on_the_cpu():
    for x in (torch.tensor([1, 2], dtype=torch.int16), torch.tensor(1, dtype=torch.int16), torch.tensor(True)):
        for function in (torch.bitwise_or, torch.bitwise_and, torch.bitwise_xor):
            for found, expected in ((function(x.npu(), 4), function(x, 4)), (function(4, x.npu()), function(4, x))):
                assert found.dtype is expected.dtype
                assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 3, 5)], ids=["1d", "2d"])
def test_targets_in_int32(shape, reduction):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    target = torch.arange(x.numel() // 4).view(shape[0], *shape[2:]) % 4

    def run(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        x = x.requires_grad_()
        loss = F.nll_loss(x, target, weight, ignore_index=2, reduction=reduction)
        return [loss.detach(), torch.autograd.grad(loss.sum(), x)[0]]

    weight = torch.tensor([0.5, 1.0, 2.0, 0.25])
    found = run(x.npu(), target.int().npu(), weight.npu())
    for one, other in zip(found, run(x.double(), target, weight.double()), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-5, atol=1e-6)


def test_cross_entropy_and_take_in_int32():
    x, index = torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    torch.testing.assert_close(F.cross_entropy(x.npu(), index.int().npu()).cpu(), F.cross_entropy(x, index))
    assert torch.equal(torch.take(x.npu(), index.int().npu()).cpu(), x.take(index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_multilabel_margin_loss_in_int32(reduction, dtype):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.tensor([[3, 0, -1, 1], [1, 1, 1, 1], [-1, 0, 0, 0]])
    wanted = F.multilabel_margin_loss(x.double(), target, reduction=reduction)
    found = F.multilabel_margin_loss(x.npu(), target.int().npu(), reduction=reduction)
    assert found.dtype is dtype
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=torch.finfo(dtype).eps, atol=0)
    out = torch.empty_like(found)
    number = ["none", "mean", "sum"].index(reduction)
    torch._C._nn.multilabel_margin_loss(x.npu(), target.int().npu(), number, out=out)
    assert torch.equal(out, found)


@pytest.mark.parametrize("classes", [-1, 5, 7])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_hot_has_the_dtype_of_its_argument(dtype, classes):
    x = torch.tensor([[0, 4], [2, 2]])
    found = F.one_hot(x.to(dtype).npu(), classes)
    assert found.dtype is dtype
    assert torch.equal(found.cpu().long(), F.one_hot(x, classes))


@pytest.mark.parametrize(("name", "function"), [("_softmax", torch.softmax), ("_log_softmax", torch.log_softmax)])
def test_from_half_to_float(name, function):
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).half()
    forward, backward = getattr(torch, name), getattr(torch, f"{name}_backward_data")
    y = forward(x.npu(), 1, True)
    assert y.dtype is torch.float32
    leaf = x.double().requires_grad_()
    expected = function(leaf, 1)
    torch.testing.assert_close(y.cpu().double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(forward(x.npu(), 1, True, out=torch.empty(3, 7, device="npu")), y)

    weights = torch.linspace(-1, 1, 21).view(3, 7)
    wanted = torch.autograd.grad(expected, leaf, weights.double())[0]
    grad = backward(weights.npu(), y, 1, torch.float16)
    assert grad.dtype is torch.float16
    torch.testing.assert_close(grad.cpu().double(), wanted, rtol=2**-11, atol=2**-16)
    for size in ((3, 7), (0,)):
        out = torch.empty(size, dtype=torch.float16, device="npu")
        assert backward(weights.npu(), y, 1, torch.float16, **{OUT[name]: out}) is out
        assert torch.equal(out, grad)
    leaf = x.npu().requires_grad_()
    assert torch.equal(torch.autograd.grad(forward(leaf, 1, True), leaf, weights.npu())[0], grad)


OUT = {"_softmax": "grad_input", "_log_softmax": "out"}


def test_from_bfloat16_to_float_is_refused():
    with pytest.raises(RuntimeError, match=r"half_to_float needs a float16 input, not torch\.bfloat16"):
        torch._softmax(torch.ones(3, dtype=torch.bfloat16).npu(), 0, True)


def test_slogdet_and_its_gradient():
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.requires_grad_()
        sign, logarithm = torch.slogdet(x)
        return [sign.detach(), logarithm.detach(), torch.autograd.grad(logarithm.sum(), x)[0]]

    for one, other in zip(run(x.npu()), run(x.double()), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-4)
