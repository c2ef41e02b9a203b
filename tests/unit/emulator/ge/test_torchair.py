"""PyTorch functions through torchair's real front end and the engine, against PyTorch on the CPU in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchair
from torch.utils._pytree import tree_leaves, tree_map_only
from torchair.configs.compiler_config import CompilerConfig

from qwen2_npu import ops
from qwen2_npu.emulator.ge import graph
from tests.unit.emulator.ge.functions import FAST, FUNCTIONS

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def backend() -> Any:
    return torchair.get_npu_backend(compiler_config=CompilerConfig())


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> Iterator[list[list[str]]]:
    """The node types of every graph that is loaded."""
    seen: list[list[str]] = []

    def note(name: str, ge_graph: Any, options: dict[str, str]) -> None:
        seen.append([op.type for op in ge_graph.op])

    graph.loaded.append(note)
    yield seen
    graph.loaded.remove(note)


def compiled(function: Callable[..., Any], backend: Any, dynamic: bool = False) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def to_npu(values: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.clone().npu(), values)


def exact(values: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.double() if t.dtype is torch.float32 else t.clone(), values)


def assert_close(got: Any, want: Any) -> None:
    """Integers are equal; floats within 32 roundings of the largest number of the result."""
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for have, value in zip(got, want, strict=True):
        have = have.cpu()
        assert have.shape == value.shape
        assert have.dtype == value.dtype or value.dtype is torch.float64
        if have.is_floating_point():
            bound = 32 * torch.finfo(torch.float32).eps * value.abs().max()
            assert ((have - value).abs() <= bound).all(), (have, value)
        else:
            assert torch.equal(have, value)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FUNCTIONS]
)
def test_a_function_gives_what_pytorch_gives(name: str, backend: Any, graphs: list[list[str]]) -> None:
    function, inputs = FUNCTIONS[name]
    assert_close(compiled(function, backend)(*to_npu(inputs)), function(*exact(inputs)))
    assert len(graphs) == 1


def test_a_wrong_function_is_seen(backend: Any) -> None:
    with pytest.raises(AssertionError):
        assert_close(compiled(torch.sin, backend)(torch.ones(2).npu()), torch.cos(torch.ones(2).double()))


# ---- memory ------------------------------------------------------------------------------------------------------
def f_add(x: Tensor) -> Tensor:
    x.add_(1)
    return x * 2


def f_old_and_new(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    old, view = x * 10, x[:1].clone()
    x.mul_(-1)
    return old, view, x + 1


def f_part(x: Tensor) -> Tensor:
    x[1].copy_(x[0] + 5)
    return x.sum()


def f_swap(x: Tensor, y: Tensor) -> Tensor:
    keep = x.clone()
    x.copy_(y)
    y.copy_(keep)
    return keep


def f_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    return y, y


def f_transposed_in_place(x: Tensor) -> Tensor:
    x.copy_(x.t().clone())
    return x


def f_returns_inputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x.add_(1)
    return x, x.t(), x + 0


SQUARE = torch.arange(9.0).reshape(3, 3)
WRITERS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "add_": (f_add, (SQUARE,)),
    "old and new": (f_old_and_new, (SQUARE,)),
    "part": (f_part, (SQUARE,)),
    "swap": (f_swap, (SQUARE, SQUARE + 10)),
    "twice": (f_twice, (SQUARE,)),
    "transposed in place": (f_transposed_in_place, (SQUARE,)),
    "returns inputs": (f_returns_inputs, (SQUARE,)),
    "not dense": (f_add, (torch.arange(12.0).reshape(3, 4).t(),)),
}

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "ref data": {"enable_ref_data": True},
    "no view optimisation": {"enable_view_optimize": False},
    "mutations outside": {"keep_inference_input_mutations": False},
    "no-ops kept": {"remove_noop_ops": False},
    "frozen": {"frozen_parameter": True},
    "stable order": {"topology_sorting_strategy": "StableRDFS"},
    "tiling sunk": {"tiling_schedule_optimize": True},
}


def backend_with(options: dict[str, Any]) -> Any:
    config = CompilerConfig()
    for name, value in options.items():
        setattr(config.experimental_config, name, value)
    return torchair.get_npu_backend(compiler_config=config)


def check_writer(name: str, backend: Any) -> None:
    function, inputs = WRITERS[name]
    on_cpu = tuple(t.clone() for t in inputs)
    on_npu = tuple(torch.empty_strided(t.shape, t.stride(), device="npu").copy_(t) for t in inputs)
    addresses = [t.data_ptr() for t in on_npu]
    want = function(*on_cpu)
    got = compiled(function, backend)(*on_npu)
    assert_close([got, *on_npu], [want, *on_cpu])
    assert [t.data_ptr() for t in on_npu] == addresses


@pytest.mark.parametrize("name", WRITERS)
def test_functions_that_write_their_inputs(name: str, backend: Any) -> None:
    check_writer(name, backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("options", CONFIGS)
def test_functions_that_write_their_inputs_whatever_the_options(name: str, options: str) -> None:
    check_writer(name, backend_with(CONFIGS[options]))


def update(cache: Tensor, at: Tensor, step: Tensor) -> Tensor:
    torch.ops.npu.scatter_update_(cache, at, step, 1)
    return cache.sum(1)


def cache_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(2, 4, 3).npu(), torch.tensor([1, 3]).npu(), torch.ones(2, 1, 3).npu()


def test_a_cache_is_written_where_it_lies(backend: Any, graphs: list[list[str]]) -> None:
    cache, at, step = cache_inputs()
    step_of = compiled(update, backend)
    for turn in range(3):
        total = step_of(cache, at, step * (turn + 1))
        want = torch.zeros(2, 4, 3)
        want[0, 1] = want[1, 3] = turn + 1
        assert torch.equal(cache.cpu(), want)
        assert torch.equal(total.cpu(), want.sum(1))
    assert len(graphs) == 1
    assert "TensorMove" not in graphs[0]
    assert "Assign" not in graphs[0]


def test_a_cache_that_is_not_written_where_it_lies_would_be_seen(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.kernels["scatter_update_"]
    monkeypatch.setitem(ops.kernels, "scatter_update_", lambda cache, *rest: right(cache.clone(), *rest))
    cache, at, step = cache_inputs()
    compiled(update, backend)(cache, at, step)
    assert torch.equal(cache.cpu(), torch.zeros(2, 4, 3))


# ---- shapes and parameters ---------------------------------------------------------------------------------------
def test_one_graph_serves_every_size(backend: Any, graphs: list[list[str]]) -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        both = torch.cat((x, y))
        return both.reshape(-1, 2) @ both.reshape(2, -1), x.shape[0] * 2 + 1

    run = compiled(function, backend, dynamic=True)
    for rows in (4, 6, 8):
        x, y = SQUARE[:1, :2].repeat(rows, 1), SQUARE[1:2, :2].repeat(rows + 1, 1)
        got, number = run(x.npu(), y.npu())
        want, expected = function(x.double(), y.double())
        assert_close(got, want)
        assert number == expected
    assert len(graphs) == 1


def test_lists_of_numbers_are_inputs_of_a_dynamic_graph(backend: Any, graphs: list[list[str]]) -> None:
    query, key = torch.ones(2, 1, 1, 16).npu(), torch.arange(8.0).reshape(1, 8, 1, 1).expand(2, 8, 1, 16).npu()

    def function(query: Tensor, key: Tensor, lengths: list[int]) -> Tensor:
        return torch.ops.npu.npu_incre_flash_attention(
            query, key, key, num_heads=1, input_layout="BSND", scale_value=0.0, actual_seq_lengths=lengths
        )

    run = compiled(function, backend, dynamic=True)
    for lengths in ([3, 5], [4, 6], [5, 7]):
        for tensor in (query, key):
            torch._dynamo.mark_static(tensor)
        got = run(query, key.contiguous(), lengths)
        # Without scores the result is the mean of the live values.
        assert got[:, 0, 0, 0].tolist() == pytest.approx([sum(range(n)) / n for n in lengths])
    assert len(graphs) == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_are_read_at_every_run(frozen: bool) -> None:
    layer = torch.nn.Linear(4, 3).npu().requires_grad_(False)
    run = compiled(layer, backend_with({"frozen_parameter": frozen}))
    x = torch.ones(2, 4).npu()
    first = run(x).cpu()
    layer.weight.mul_(2)
    second = run(x).cpu()
    bias = layer.bias.cpu()
    assert torch.allclose(second - bias, 2 * (first - bias), atol=1e-5)


def test_random_numbers_move_on_and_repeat(backend: Any) -> None:
    run = compiled(lambda x: torch.nn.functional.dropout(x, 0.5), backend)
    x = torch.ones(64).npu()
    torch.npu.manual_seed(3)
    first, second = run(x), run(x)
    torch.npu.manual_seed(3)
    assert torch.equal(run(x), first)
    assert not torch.equal(first, second)
    assert set(first.tolist()) == {0.0, 2.0}


def test_an_operator_that_the_table_lacks_is_named_when_the_function_is_compiled(backend: Any) -> None:
    x = torch.ones(4).npu()
    with pytest.raises(Exception, match=r"GE operator TanhGrad \(TanhGrad\) is not in the emulator's table"):
        compiled(torch.ops.aten.tanh_backward.default, backend)(x, x)
