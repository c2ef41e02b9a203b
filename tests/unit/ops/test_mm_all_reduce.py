"""npu_mm_all_reduce_base on two ranks: threads of this process over real gloo groups, which no other test sees."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qwen2_npu.conformance.operators import CATALOGUE, DTYPES, compare
from qwen2_npu.conformance.operators.check import to_array, to_tensors
from qwen2_npu.conformance.operators.mm_all_reduce import golden_of_ranks
from qwen2_npu.conformance.operators.one_rank import group as one_rank
from qwen2_npu.ops import mm_all_reduce
from qwen2_npu.ops.mm_all_reduce import communicator_name
from qwen2_npu.parallel.collectives import Ranks
from tests.unit.conformance.operators.test_negative_controls import without_last_bits
from tests.unit.parallel.virtual import Run, virtual_ranks

npu = torch.ops.npu
RANKS = 2
RECORD = CATALOGUE["npu_mm_all_reduce_base"]
BOTH = {"rows": [2, 3], "inner": 64, "columns": 24, "bias": True, "x3": True}


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with virtual_ranks(RANKS) as run:
        yield run


def results(run: Run, every: list[dict[str, Any]], dtype: str) -> list[Tensor]:
    def product(ranks: Ranks) -> Tensor:
        given = {**to_tensors(every[ranks.shard.rank], dtype), "hcom": ranks.communicator(torch.device("cpu"))}
        return npu.npu_mm_all_reduce_base(**given)

    return run(product)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [{}, {"bias": True}, {"x3": True}, BOTH], ids=["alone", "bias", "x3", "both"])
def test_two_ranks_match_the_golden(run: Run, given: dict[str, Any], dtype: str) -> None:
    every = [RECORD.arguments({"rows": [5], "inner": 96, "columns": 33, **given}, dtype, rank) for rank in range(RANKS)]
    (expected,) = golden_of_ranks(every, dtype)
    first, second = results(run, every, dtype)
    assert torch.equal(first, second)
    assert first.dtype == getattr(torch, dtype)
    assert compare(expected, to_array(first)) is None


def test_bias_and_x3_count_once_per_rank(run: Run) -> None:
    """Two ranks that give the same residual get it twice: CANN's formula, and a trap for row-parallel layers."""
    x1, x2, bias, x3 = torch.zeros(2, 4), torch.zeros(4, 3), torch.full((3,), 10.0), torch.ones(2, 3)
    found = run(lambda ranks: npu.npu_mm_all_reduce_base(x1, x2, ranks.group.group_name, bias=bias, x3=x3))
    assert all(torch.equal(one, torch.full((2, 3), 22.0)) for one in found)


def test_the_golden_of_two_ranks_sees_x3_added_once(run: Run) -> None:
    every = [RECORD.arguments(BOTH, "bfloat16", rank) for rank in range(RANKS)]
    (expected,) = golden_of_ranks(every, "bfloat16")
    (right, _) = results(run, every, "bfloat16")
    late = to_tensors(every[1], "bfloat16")["x3"]
    assert compare(expected, to_array(right)) is None
    assert compare(expected, to_array(right - late)) is not None


@pytest.mark.parametrize(("ranks", "bits"), [(2, (9, 1, 1)), (8, (10, 5, 4))])
def test_the_golden_of_several_ranks_sees_a_sum_without_its_last_bits(ranks: int, bits: tuple[int, ...]) -> None:
    """So its tolerance is that of so many ranks in its own dtype. ``bits``: of each dtype."""
    for dtype, lost in zip(DTYPES, bits, strict=True):
        given = {"rows": [5], "inner": 96, "columns": 33, "bias": True}
        (expected,) = golden_of_ranks([RECORD.arguments(given, dtype, rank) for rank in range(ranks)], dtype)
        assert expected.value is not None
        assert compare(expected, without_last_bits(expected.value, dtype, lost)) is not None, dtype


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    hcom = communicator_name(one_rank("cpu"), torch.device("cpu"))
    weight = torch.randn(8, 16)

    def layer(x: Tensor) -> Tensor:
        return npu.npu_mm_all_reduce_base(x * 2, weight.t(), hcom) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x), 2 * x @ weight.t() + 1)


def test_fake_tensors_need_no_group() -> None:
    with FakeTensorMode():
        x1, x2 = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(8, 5, dtype=torch.bfloat16)
        found = npu.npu_mm_all_reduce_base(x1, x2, "nobody")
    assert (found.shape, found.dtype) == ((2, 3, 5), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_over_the_cards_is_taken_in_float32(dtype: torch.dtype) -> None:
    """Two ranks cannot show it: a sum of two is rounded once in any dtype."""
    with FakeTensorMode():
        x1, x2 = torch.empty(3, 8, dtype=dtype), torch.empty(8, 5, dtype=dtype)
        traced = make_fx(lambda x1, x2: npu.npu_mm_all_reduce_base(x1, x2, "nobody"))(x1, x2)
    summed = torch.ops._c10d_functional.all_reduce.default
    (node,) = traced.graph.find_nodes(op="call_function", target=summed)
    assert node.args[0].meta["val"].dtype == torch.float32


@pytest.mark.parametrize("available", [True, False])
def test_the_collectives_are_loaded_where_pytorch_has_them(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None in sys.modules: importing it raises, as in a PyTorch that was built without them."""
    monkeypatch.setitem(sys.modules, "torch.distributed._functional_collectives", None)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: available)
    again = ModuleType("again")
    loader = SourceFileLoader("again", str(mm_all_reduce.__file__))
    if available:
        with pytest.raises(ImportError, match="_functional_collectives"):
            loader.exec_module(again)
    else:
        loader.exec_module(again)
        assert again.OP == mm_all_reduce.OP


@pytest.mark.parametrize("name", ["x1", "x2", "bias", "x3"])
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    """Smaller and larger ones, of as many dimensions and of others."""
    shapes = {"x1": (2, 2, 4), "x2": (4, 3), "bias": (3,), "x3": (2, 2, 3)}
    right = shapes[name]
    others = [right[1:], right[:-1], (1, *right), (2, *right)]
    for at, size in enumerate(right):
        others += [(*right[:at], other, *right[at + 1 :]) for other in (size - 1, size + 1)]
    for other in others:
        given = {each: torch.ones(shape) for each, shape in (shapes | {name: other}).items()}
        with pytest.raises(ValueError, match=r"^npu::npu_mm_all_reduce_base: (x1|x2|bias|x3) is "):
            npu.npu_mm_all_reduce_base(given.pop("x1"), given.pop("x2"), "nobody", **given)


def test_errors() -> None:
    x1, x2 = torch.ones(2, 4), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"npu_mm_all_reduce_base: hcom is 'nobody'; .* communicator_name\(group"):
        npu.npu_mm_all_reduce_base(x1, x2, "nobody")
    with pytest.raises(ValueError, match=r"x1 is .* contiguous memory, not strides \(1, 2\)"):
        npu.npu_mm_all_reduce_base(torch.ones(4, 2).t(), torch.ones(4, 3), "nobody")
    with pytest.raises(ValueError, match=r"x2 is .* or its transpose, not strides \(6, 2\)"):
        npu.npu_mm_all_reduce_base(x1, torch.ones(4, 6)[:, ::2], "nobody")
    with pytest.raises(ValueError, match="comm_turn is 4; supported: only the default 0"):
        npu.npu_mm_all_reduce_base(x1, x2, "nobody", comm_turn=4)
