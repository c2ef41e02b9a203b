"""The inductor pass: right sums, read once, only where it helps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear

from qwen2_npu import compile_model
from qwen2_npu.graph import small_batch
from qwen2_npu.graph.small_batch import MAX_ROWS, SmallBatchProducts, rewrite
from qwen2_npu.ops import quantization
from qwen2_npu.ops.linear import IN_GRAPHS
from qwen2_npu.ops.linear import MAX_ROWS as MAX_CUT_ROWS
from qwen2_npu.ops.linear import linear as eager_product
from tests.unit.products import assert_exact
from tests.unit.quantised import quantised_config, quantised_model

aten = torch.ops.aten


pytestmark = pytest.mark.usefixtures("two_threads")


MULTIPLIES_BF16 = small_batch._multiplies_bf16  # the fixture puts another one in its place


@pytest.fixture(autouse=True)
def _processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """An x86 without bf16, whatever runs the tests."""
    monkeypatch.setattr(small_batch.linear, "_measured_here", lambda: True)
    monkeypatch.setattr(small_batch, "_multiplies_bf16", lambda: False)


def graph_of(
    function: Callable[..., torch.Tensor], *arguments: torch.Tensor, mode: str = "fake"
) -> torch.fx.GraphModule:
    """The aten graph that inductor's pass is given."""
    return make_fx(function, tracing_mode=mode)(*arguments)


def products(graph: torch.fx.Graph) -> int:
    return sum(len(graph.find_nodes(op="call_function", target=t)) for t in (aten.mm.default, aten.addmm.default))


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_processors_that_multiply_bf16(avx512, amx, monkeypatch):
    """By either set of instructions."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert MULTIPLIES_BF16() is (avx512 or amx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_in_float32_and_rounds_once(dtype, rows, bias):
    torch.manual_seed(0)
    arguments = [torch.randn(rows, 96), torch.randn(40, 96), *([torch.randn(40)] if bias else [])]
    arguments = [tensor.to(dtype) for tensor in arguments]
    traced = graph_of(linear, *arguments)
    assert products(traced.graph) == 1
    rewrite(traced.graph)
    traced.recompile()
    assert products(traced.graph) == 0
    got = traced(*arguments)
    assert got.dtype == dtype
    assert_exact(got, *arguments)


@pytest.mark.parametrize("rows", [MAX_ROWS + 1, 64])
def test_larger_batches_stay_with_blas(rows):
    traced = graph_of(linear, torch.randn(rows, 96), torch.randn(40, 96))
    rewrite(traced.graph)
    assert products(traced.graph) == 1


def test_a_product_with_a_computed_matrix_is_left_alone():
    traced = graph_of(lambda x: x @ (x + 1).t().contiguous(), torch.randn(4, 96))
    rewrite(traced.graph)
    assert products(traced.graph) == 1


@pytest.mark.parametrize("factors", [{"beta": 2}, {"alpha": 2}], ids=str)
def test_a_sum_with_factors_is_left_alone(factors):
    arguments = torch.randn(40), torch.randn(4, 96), torch.randn(40, 96)
    traced = graph_of(lambda bias, x, weight: torch.addmm(bias, x, weight.t(), **factors), *arguments)
    rewrite(traced.graph)
    assert products(traced.graph) == 1


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("symbolic", (torch.zeros(4, 96), torch.zeros(40, 96))),
        ("fake", (torch.zeros(4, 96, device="meta"), torch.zeros(40, 96, device="meta"))),
        ("fake", (torch.zeros(4, 96, dtype=torch.int32), torch.zeros(40, 96, dtype=torch.int32))),
    ],
    ids=["any number of rows", "another device", "integers"],
)
def test_other_products_are_left_alone(mode, arguments):
    traced = graph_of(lambda x, weight: x @ weight.t(), *arguments, mode=mode)
    rewrite(traced.graph)
    assert products(traced.graph) == 1


@pytest.mark.parametrize(
    ("dtype", "multiplies_bf16", "inputs", "rows"),
    [
        (torch.float32, True, 896, 8),
        (torch.float32, True, 4864, 3),
        (torch.float32, True, 18944, 3),
        (torch.bfloat16, True, 896, 4),
        (torch.bfloat16, True, 1536, 2),
        (torch.bfloat16, True, 3584, 1),
        (torch.bfloat16, True, 4864, 0),
        (torch.bfloat16, False, 4864, 8),
        (torch.float16, True, 4864, 8),
    ],
)
def test_rows_up_to_which_the_loop_is_taken(dtype, multiplies_bf16, inputs, rows, monkeypatch):
    monkeypatch.setattr(small_batch, "_multiplies_bf16", lambda: multiplies_bf16)
    monkeypatch.setattr(small_batch.linear, "faster_product", lambda rows, weight: None)
    left = []
    for count in (max(rows, 1), rows + 1):
        traced = graph_of(linear, torch.randn(count, inputs, dtype=dtype), torch.randn(16, inputs, dtype=dtype))
        rewrite(traced.graph)
        left.append(products(traced.graph))
    assert left == ([0, 1] if rows else [1, 1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "dtype"),
    [
        (MAX_ROWS + 1, 768, torch.float32),
        (64, 768, torch.float32),
        (MAX_CUT_ROWS, 768, torch.float32),
        (1, 4864, torch.bfloat16),
    ],
    ids=str,
)
def test_elsewhere_the_product_of_the_eager_model(rows, inputs, dtype, bias, monkeypatch):
    monkeypatch.setattr(small_batch, "_multiplies_bf16", lambda: True)
    torch.manual_seed(0)
    arguments = [torch.randn(rows, inputs), torch.randn(1024, inputs), *([torch.randn(1024)] if bias else [])]
    arguments = [tensor.to(dtype) for tensor in arguments]
    rewritten = []

    class Recording(SmallBatchProducts):
        def __call__(self, graph):
            super().__call__(graph)
            rewritten.extend(graph.find_nodes(op="call_function", target=IN_GRAPHS))

    options = {"post_grad_custom_pre_pass": Recording(), "fx_graph_cache": False}
    torch._dynamo.reset()
    got = torch.compile(linear, options=options)(*arguments)
    assert len(rewritten) == 1
    assert torch.equal(got, eager_product(*arguments))


def test_longer_prompts_take_the_whole_weight():
    traced = graph_of(linear, torch.randn(MAX_CUT_ROWS + 1, 768), torch.randn(1024, 768))
    rewrite(traced.graph)
    assert products(traced.graph) == 1


def test_a_graph_for_other_threads_is_another_graph():
    two = SmallBatchProducts().uuid()
    torch.set_num_threads(1)
    assert SmallBatchProducts().uuid() != two


# ---- weights of 8-bit integers --------------------------------------------------------------------------------------
def quantised(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
    return torch.ops.npu.npu_weight_quant_batchmatmul(x, weight.mT, scale, bias=bias[0] if bias else None)


def left(graph: torch.fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=quantization.IN_GRAPHS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_8_bit_weights_become_loops_with_the_numbers_of_eager_mode(dtype, rows, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 96).to(dtype), torch.randint(-127, 128, (64, 96), dtype=torch.int8)
    arguments = [x, weight, (torch.rand(64) / 100).to(dtype), *([torch.randn(64)] if bias else [])]
    traced = graph_of(quantised, *arguments)
    assert left(traced.graph) == 1
    rewrite(traced.graph)
    traced.recompile()
    assert left(traced.graph) == 0
    found, expected = traced(*arguments), quantised(*arguments)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(("rows", "inputs"), [(5, 96), (1, 8192), (64, 96)])
def test_more_rows_or_wider_8_bit_weights_stay_with_the_eager_product(rows, inputs):
    arguments = torch.randn(rows, inputs), torch.zeros(64, inputs, dtype=torch.int8), torch.ones(64)
    traced = graph_of(quantised, *arguments)
    rewrite(traced.graph)
    assert left(traced.graph) == 1


def test_an_8_bit_weight_that_is_not_transposed_stays_with_the_eager_product():
    def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.ops.npu.npu_weight_quant_batchmatmul(x, weight, scale)

    traced = graph_of(product, torch.randn(4, 96), torch.zeros(96, 64, dtype=torch.int8), torch.ones(64))
    rewrite(traced.graph)
    assert left(traced.graph) == 1


@pytest.mark.parametrize(("mode", "where"), [("symbolic", "cpu"), ("fake", "meta")])
def test_any_number_of_rows_and_other_devices_keep_their_8_bit_product(mode, where):
    def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return quantization.IN_GRAPHS(x, weight.mT, scale, None)

    arguments = torch.zeros(4, 96), torch.zeros(64, 96, dtype=torch.int8), torch.ones(64)
    traced = graph_of(product, *(tensor.to(where) for tensor in arguments), mode=mode)
    rewrite(traced.graph)
    assert left(traced.graph) == 1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_a_compiled_model_of_8_bit_weights_generates_the_tokens_of_the_eager_one(scheme):
    model = quantised_model(quantised_config(scheme, num_hidden_layers=1))
    ids = torch.arange(1, 9)[None]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(compile_model(model, "inductor").generate(ids, max_new_tokens=5, do_sample=False), expected)
