"""The inductor pass: right sums, read once, only where it helps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear

from qwen2_npu.graph import small_batch
from qwen2_npu.graph.small_batch import MAX_ROWS, SmallBatchProducts, rewrite
from qwen2_npu.ops.linear import MAX_ROWS as MAX_CUT_ROWS
from tests.unit.products import assert_exact

aten = torch.ops.aten


pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def _no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_batch, "_multiplies_bf16", lambda: False)


def graph_of(function: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> torch.fx.GraphModule:
    """The aten graph that inductor's pass is given."""
    return make_fx(function, tracing_mode="fake")(*arguments)


def products(graph: torch.fx.Graph) -> int:
    return sum(len(graph.find_nodes(op="call_function", target=t)) for t in (aten.mm.default, aten.addmm.default))


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
    exact = linear(*(tensor.double() for tensor in arguments))
    got = traced(*arguments)
    assert got.dtype == dtype
    # 97 additions in float32, then one rounding to the dtype.
    magnitude = linear(*(tensor.double().abs() for tensor in arguments))
    bound = exact.abs() * torch.finfo(dtype).eps + 98 * torch.finfo(torch.float32).eps * magnitude
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("rows", [MAX_ROWS + 1, 64])
def test_larger_batches_stay_with_blas(rows):
    traced = graph_of(linear, torch.randn(rows, 96), torch.randn(40, 96))
    rewrite(traced.graph)
    assert products(traced.graph) == 1


def test_a_product_with_a_computed_matrix_is_left_alone():
    traced = graph_of(lambda x: x @ (x + 1).t().contiguous(), torch.randn(4, 96))
    rewrite(traced.graph)
    assert products(traced.graph) == 1


@pytest.mark.parametrize(
    ("dtype", "multiplies_bf16", "inputs", "rows"),
    [
        (torch.float32, True, 896, 8),
        (torch.float32, True, 4864, 3),
        (torch.float32, True, 18944, 3),
        (torch.bfloat16, True, 896, 4),
        (torch.bfloat16, True, 4864, 1),
        (torch.bfloat16, True, 18944, 0),
        (torch.bfloat16, False, 4864, 8),
        (torch.float16, True, 4864, 8),
    ],
)
def test_rows_up_to_which_the_loop_is_taken(dtype, multiplies_bf16, inputs, rows, monkeypatch):
    monkeypatch.setattr(small_batch, "_multiplies_bf16", lambda: multiplies_bf16)
    left = []
    for count in (max(rows, 1), rows + 1):
        traced = graph_of(linear, torch.randn(count, inputs, dtype=dtype), torch.randn(16, inputs, dtype=dtype))
        rewrite(traced.graph)
        left.append(products(traced.graph))
    assert left == ([0, 1] if rows else [1, 1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [MAX_ROWS + 1, 64, MAX_CUT_ROWS])
def test_short_prompts_take_one_part_of_a_large_weight_per_thread(rows, bias):
    torch.manual_seed(0)
    arguments = [torch.randn(rows, 768), torch.randn(1024, 768), *([torch.randn(1024)] if bias else [])]
    traced = graph_of(linear, *arguments)
    rewrite(traced.graph)
    traced.recompile()
    assert products(traced.graph) == 0
    (cut,) = traced.graph.find_nodes(op="call_function", target=aten.bmm.default)
    assert cut.meta["val"].shape == (2, rows, 512)
    assert_exact(traced(*arguments), *arguments)


def test_longer_prompts_take_the_whole_weight():
    traced = graph_of(linear, torch.randn(MAX_CUT_ROWS + 1, 768), torch.randn(1024, 768))
    rewrite(traced.graph)
    assert products(traced.graph) == 1


def test_a_graph_for_other_threads_is_another_graph():
    two = SmallBatchProducts().uuid()
    torch.set_num_threads(1)
    assert SmallBatchProducts().uuid() != two
