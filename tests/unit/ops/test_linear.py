"""The linear product: right in every shape, cut only where that is faster, differentiable, F.linear elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from qwen2_npu.ops.linear import MAX_ROWS, MIN_WEIGHT, linear, parts
from tests.unit.products import assert_exact

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the batched products that were computed."""
    shapes: list[torch.Size] = []
    bmm = torch.bmm

    def recorded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.append(b.shape)
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", recorded)
    return shapes


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (2, 5), (MAX_ROWS,), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_cut_products_are_the_whole_one(shape: tuple[int, ...], bias: bool, products: list[torch.Size]) -> None:
    x, weight, b = numbers(*shape, 768), numbers(1024, 768), numbers(1024) if bias else None
    got = linear(x, weight, b)
    assert products == [(2, 768, 512)]
    assert got.shape == (*shape, 1024)
    assert got.is_contiguous()
    assert_exact(got, x, weight, b)


def test_reads_the_weight_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, storages = numbers(1024, 768), []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: storages.append(b.untyped_storage().data_ptr()) or bmm(a, b))
    linear(numbers(4, 768), weight)
    assert storages == [weight.untyped_storage().data_ptr()]


def test_strided_inputs() -> None:
    x, weight = numbers(768, 6).t(), numbers(1024, 768)
    assert_exact(linear(x, weight), x, weight)


@pytest.mark.parametrize(
    ("rows", "weight"),
    [
        (MAX_ROWS + 1, torch.empty(1024, 768)),
        (4, torch.empty(1024, MIN_WEIGHT // 1024 - 1)),
        (4, torch.empty(1025, 768)),
        (4, torch.empty(768, 1024).t()),
        (4, torch.empty(1024, 768, dtype=torch.bfloat16)),
    ],
    ids=["many rows", "small weight", "odd outputs", "transposed weight", "bf16"],
)
def test_elsewhere_one_product(rows: int, weight: torch.Tensor) -> None:
    assert parts(rows, weight) == 1


def test_one_thread_takes_one_product() -> None:
    torch.set_num_threads(1)
    assert parts(4, torch.empty(1024, 768)) == 1


def test_fake_tensors_are_not_cut(products: list[torch.Size]) -> None:
    with FakeTensorMode():
        assert linear(torch.empty(2, 768), torch.empty(1024, 768)).shape == (2, 1024)
    assert not products


def test_a_weight_of_another_class_keeps_its_own_product(products: list[torch.Size]) -> None:
    """Quantised weights are tensor subclasses that answer F.linear."""

    class Answers(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is F.linear:
                return "answered"
            return super().__torch_function__(function, types, args, kwargs or {})

    weight = numbers(1024, 768).as_subclass(Answers)
    assert linear(numbers(2, 768), weight) == "answered"
    assert not products


def test_gradients() -> None:
    x, weight, bias = numbers(3, 768), numbers(1024, 768), numbers(1024)
    gradients = []
    for product in (linear, F.linear):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        gradients.append(torch.autograd.grad(product(*inputs).square().sum(), inputs))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-2)


def test_widths_that_differ_raise_pytorchs_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(numbers(2, 384), numbers(1024, 768))
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(numbers(2, 768).double(), numbers(1024, 768))
