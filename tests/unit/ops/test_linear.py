"""The linear product: right in every shape, another way than F.linear only where that is faster, differentiable."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from qwen2_npu.ops import linear as module
from qwen2_npu.ops.linear import IN_GRAPHS, MAX_ROWS, MIN_WEIGHT, faster_product, in_parts, linear, without_onednn
from tests.unit.products import assert_exact

pytestmark = pytest.mark.usefixtures("two_threads")

IS_MEASURED_HERE = module._measured_here.__wrapped__


@pytest.fixture(autouse=True)
def _measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on x86, whatever runs the tests."""
    monkeypatch.setattr(module, "_measured_here", lambda: True)


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
        (2, torch.empty(1024, 768, dtype=torch.bfloat16)),
        (1, torch.empty(768, 1024, dtype=torch.bfloat16).t()),
        (1, torch.empty(1024, 768, dtype=torch.float16)),
        (1, torch.empty(1024, 768, dtype=torch.float64)),
    ],
    ids=["many rows", "small weight", "odd outputs", "transposed", "bf16 rows", "bf16 transposed", "fp16", "float64"],
)
def test_elsewhere_pytorch_s_product(rows: int, weight: torch.Tensor) -> None:
    assert faster_product(rows, weight) is None


def test_one_thread_takes_one_product() -> None:
    torch.set_num_threads(1)
    assert faster_product(4, torch.empty(1024, 768)) is None


@pytest.mark.parametrize(("capability", "measured"), [("AVX512", True), ("AVX2", True), ("DEFAULT", False)])
def test_only_on_the_processors_it_was_measured_on(
    capability: str, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(module, "_measured_here", IS_MEASURED_HERE)
    assert faster_product(4, torch.empty(1024, 768)) is (in_parts if measured else None)
    assert faster_product(1, torch.empty(1024, 768).bfloat16()) is (without_onednn if measured else None)


@pytest.fixture
def onednn_used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether oneDNN was on in each F.linear."""
    used: list[bool] = []
    product = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: used.append(torch._C._get_mkldnn_enabled()) or product(*a))
    yield used
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_one_row_in_bf16_is_multiplied_without_onednn(
    shape: tuple[int, ...], bias: bool, onednn_used: list[bool]
) -> None:
    x, weight = numbers(*shape, 768).bfloat16(), numbers(1024, 768).bfloat16()
    b = numbers(1024).bfloat16() if bias else None
    got = linear(x, weight, b)
    assert onednn_used == [False]
    assert got.shape == (*shape, 1024)
    assert_exact(got, x, weight, b)


def test_onednn_is_on_again_after_an_error(onednn_used: list[bool]) -> None:
    with pytest.raises(RuntimeError):
        linear(numbers(1, 768).bfloat16(), numbers(1024, 768).bfloat16(), numbers(1023).bfloat16())
    assert onednn_used == [False]


def test_onednn_stays_off_where_the_user_switched_it_off() -> None:
    torch._C._set_mkldnn_enabled(False)
    try:
        linear(numbers(1, 768).bfloat16(), numbers(1024, 768).bfloat16())
        assert not torch._C._get_mkldnn_enabled()
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_the_last_of_several_threads_switches_onednn_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first leaves while the second is still inside."""
    both, first_left, found = threading.Barrier(2), threading.Event(), {}
    product = F.linear

    def waits(*arguments: torch.Tensor) -> torch.Tensor:
        both.wait(10)
        if threading.current_thread().name == "second":
            first_left.wait(10)
            found["inside"] = torch._C._get_mkldnn_enabled()
        return product(*arguments)

    monkeypatch.setattr(F, "linear", waits)
    arguments = numbers(1, 768).bfloat16(), numbers(1024, 768).bfloat16()
    first, second = (threading.Thread(target=linear, args=arguments, name=name) for name in ("first", "second"))
    first.start()
    second.start()
    first.join(10)
    first_left.set()
    second.join(10)
    assert found == {"inside": False}
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (4, torch.float32)])
def test_the_operator_of_graphs_is_the_same_product(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = numbers(rows, 768).to(dtype), numbers(1024, 768).to(dtype), numbers(1024).to(dtype)
    assert torch.equal(IN_GRAPHS(x, weight, bias), linear(x, weight, bias))
    fake = IN_GRAPHS(x.to("meta"), weight.to("meta"), bias.to("meta"))
    assert (fake.shape, fake.dtype, fake.stride()) == ((rows, 1024), dtype, (1024, 1))


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
