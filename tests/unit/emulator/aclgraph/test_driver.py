"""Captures and replays through torch_npu's own interface."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchair
from torchair.configs.compiler_config import CompilerConfig

from qwen2_npu.emulator import runtime
from qwen2_npu.emulator.eager import tap

Tensor = torch.Tensor
MIB = 1 << 20


def capture(function: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
    """The graph, and what the function returned."""
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        result = function()
    return graph, result


def device(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).npu()


# ---- replay ------------------------------------------------------------------------------------------------------
def test_a_replay_computes_from_what_the_inputs_hold_then() -> None:
    x = device(1, 2)
    graph, y = capture(lambda: (x * 2 + 1).relu())
    for values in ([1.0, 2.0], [5.0, -3.0]):
        x.copy_(torch.tensor(values))
        graph.replay()
        assert y.tolist() == [max(2 * value + 1, 0) for value in values]


def test_nothing_has_been_computed_before_the_first_replay() -> None:
    x, total = device(1, 2), device(0, 0)
    graph, y = capture(lambda: total.add_(x) * 1)
    assert y.isnan().all()
    assert total.tolist() == [0, 0]
    graph.replay()
    graph.replay()
    assert total.tolist() == [2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_that_a_norm_moves_are_as_before_too(dtype: torch.dtype) -> None:
    """PyTorch's schemas do not say that they are written."""
    x, mean, var = torch.arange(12.0).view(3, 2, 2).to(dtype).npu(), device(0, 0), device(1, 1)
    graph, _ = capture(lambda: torch.nn.functional.batch_norm(x, mean, var, training=True))
    assert (mean.tolist(), var.tolist()) == ([0, 0], [1, 1])
    graph.replay()
    wanted = torch.zeros(2), torch.ones(2)
    torch.nn.functional.batch_norm(x.cpu().float(), *wanted, training=True)
    torch.testing.assert_close((mean.cpu(), var.cpu()), wanted)


def test_a_python_number_stays_what_it_was() -> None:
    x, position = device(1, 2, 3), 1
    graph, y = capture(lambda: x[position] * 10)
    position = 2
    graph.replay()
    assert y.item() == 20


def test_a_number_in_a_device_tensor_does_not() -> None:
    x, position = device(1, 2, 3), torch.tensor([1]).npu()
    graph, y = capture(lambda: x.index_select(0, position))
    position.fill_(2)
    graph.replay()
    assert y.tolist() == [3]


def test_another_tensor_in_place_of_an_input_is_not_seen() -> None:
    x = device(1, 2)
    old = x
    graph, y = capture(lambda: x + 1)
    x = device(10, 20)
    graph.replay()
    assert y.tolist() == [2, 3]
    assert old.tolist() == [1, 2]


def test_a_stale_address_shows_what_lies_there_now() -> None:
    held = [torch.ones(1000).npu()]
    graph, y = capture(lambda: held[0] + 1)
    address = held.pop().data_ptr()
    other = torch.full((1000,), 41.0).npu()
    assert other.data_ptr() == address
    graph.replay()
    assert y[0].item() == 42


def test_memory_that_the_driver_took_back_is_an_error() -> None:
    held = [torch.ones(16 * MIB).npu()]
    graph, _ = capture(lambda: held[0][:4] + 1)
    held.clear()
    torch.npu.empty_cache()
    with pytest.raises(RuntimeError, match="has been given back to the driver since it was captured"):
        graph.replay()


def test_the_graphs_own_memory_stays_its_own() -> None:
    x = device(1, 2)

    def chain() -> Tensor:
        value = x
        for _ in range(20):
            value = value * 1 + 1  # every intermediate result is freed at once
        return value

    graph, y = capture(chain)
    others = [torch.full((2,), -1.0).npu() for _ in range(200)]
    graph.replay()
    assert y.tolist() == [21, 22]
    assert all(other.tolist() == [-1, -1] for other in others)


def test_graphs_can_share_memory() -> None:
    x = device(1, 2)
    pool = torch.npu.graph_pool_handle()
    first, y = capture(lambda: x + 1, pool=pool)
    second, z = capture(lambda: y * 10, pool=pool)
    first.replay()
    second.replay()
    assert (y.tolist(), z.tolist()) == ([2, 3], [20, 30])


def test_views_and_several_results() -> None:
    x = torch.tensor([[3.0, 1.0], [2.0, 4.0]]).npu()
    graph, (values, indices, row) = capture(lambda: (*x.sort(-1), x[1]))
    x.neg_()
    graph.replay()
    assert values.tolist() == [[-3, -1], [-4, -2]]
    assert indices.tolist() == [[0, 1], [1, 0]]
    assert row.tolist() == [-2, -4]


def test_random_numbers_differ_and_repeat() -> None:
    graph, x = capture(lambda: torch.rand(8, device="npu"))
    torch.npu.manual_seed(5)
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(x.tolist())
    torch.npu.manual_seed(5)
    graph.replay()
    assert drawn[0] == x.tolist()
    assert drawn[0] != drawn[1]


def test_a_stream_that_waits_for_the_capture_belongs_to_it() -> None:
    x = device(1, 2)
    side = torch.npu.Stream()

    def fork() -> Tensor:
        y = x + 1
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            z = y * 10
        torch.npu.current_stream().wait_stream(side)
        return z + y

    graph, out = capture(fork)
    x.fill_(4)
    graph.replay()
    assert out.tolist() == [55, 55]


def test_a_stream_that_does_not_runs_at_once() -> None:
    x = device(1, 2)
    side = torch.npu.Stream()

    def apart() -> tuple[Tensor, Tensor]:
        with torch.npu.stream(side):
            now = x + 1
        return x + 2, now

    graph, (later, now) = capture(apart)
    assert now.tolist() == [2, 3]
    x.fill_(7)
    graph.replay()
    assert (later.tolist(), now.tolist()) == ([9, 9], [2, 3])


def test_copies_by_the_driver_are_replayed() -> None:
    x, y, z = device(1, 2), device(0, 0), device(5, 5)
    library = runtime.library()
    copy, fill = library.aclrtMemcpyAsync, library.aclrtMemsetAsync
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    on_device = 3

    def by_driver() -> None:
        stream = pointer(torch.npu.current_stream().npu_stream)
        assert copy(pointer(y.data_ptr()), size(8), pointer(x.data_ptr()), size(8), on_device, stream) == 0
        assert fill(pointer(z.data_ptr()), size(8), 0, size(8), stream) == 0

    graph, _ = capture(by_driver)
    assert (y.tolist(), z.tolist()) == ([0, 0], [5, 5])
    x.fill_(9)
    graph.replay()
    assert (y.tolist(), z.tolist()) == ([9, 9], [0, 0])


def test_pinned_memory_is_read_at_every_replay() -> None:
    host, x = torch.tensor([1.0, 2.0]).pin_memory(), device(0, 0)
    graph, _ = capture(lambda: x.copy_(host, non_blocking=True))
    host.fill_(8)
    graph.replay()
    assert x.tolist() == [8, 8]


def test_graphed_callables() -> None:
    layer = torch.nn.Linear(3, 2).npu()
    x = torch.ones(4, 3).npu()
    eager = layer(x).detach().cpu()
    graphed = torch.npu.make_graphed_callables(layer, (torch.zeros(4, 3).npu(),))
    out = graphed(x)
    assert torch.equal(out.detach().cpu(), eager)
    out.sum().backward()
    assert torch.equal(layer.weight.grad.cpu(), torch.full((2, 3), 4.0))


# ---- what cannot be captured -------------------------------------------------------------------------------------
WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool((x > 0).all()),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(2).npu(),
    "device": lambda x: torch.npu.synchronize(),
    "stream": lambda x: torch.npu.current_stream().synchronize(),
    "query": lambda x: torch.npu.current_stream().query(),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_the_device_ends_the_capture(name: str) -> None:
    x = device(1, 2)

    def function() -> Any:
        y = x * 2
        WAITING[name](y)
        return y

    with pytest.raises(RuntimeError) as caught:
        capture(function)
    reasons = f"{caught.value} {caught.value.__context__}"
    assert "while a graph is captured" in reasons
    assert x.tolist() == [1, 2]
    graph, y = capture(lambda: x * 3)  # the next one is not disturbed
    graph.replay()
    assert y.tolist() == [3, 6]


def test_a_failing_operator_leaves_no_trace() -> None:
    x = device(1, 2)

    def function() -> None:
        x.add_(1)
        torch.ops.aten.mm(x, x)

    with pytest.raises(RuntimeError):
        capture(function)
    assert x.tolist() == [1, 2]
    assert tap.listeners == []


def test_a_capture_inside_another_is_refused() -> None:
    x = device(1, 2)
    with pytest.raises(RuntimeError):
        capture(lambda: capture(lambda: x + 1))


def test_nobody_listens_when_nothing_is_captured() -> None:
    x = device(1, 2)
    graph, _ = capture(lambda: x + 1)
    graph.replay()
    assert (tap.listeners, tap.stored) == ([], [])


# ---- updates -----------------------------------------------------------------------------------------------------
def attention(lengths: list[int]) -> Callable[[], Tensor]:
    """Without scores, the mean of the live values 0, 1, 2, …"""
    query = torch.ones(1, 1, 1, 16, dtype=torch.float16).npu()
    key = torch.arange(8.0).reshape(1, 8, 1, 1).expand(1, 8, 1, 16).contiguous().half().npu()
    return lambda: torch.ops.npu.npu_fused_infer_attention_score(
        query, key, key, num_heads=1, input_layout="BSND", scale=0.0, actual_seq_lengths_kv=lengths
    )[0]


def mean_of(live: int) -> float:
    return (live - 1) / 2


def test_lengths_are_baked_in() -> None:
    lengths = [3]
    graph, out = capture(attention(lengths))
    lengths[0] = 5
    graph.replay()
    assert out.flatten()[0].item() == mean_of(3)


def test_lengths_can_be_updated() -> None:
    graph, out = capture(attention([3]), auto_dispatch_capture=True)
    for live in (4, 7):
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [live]}])
        graph.replay()
        assert out.flatten()[0].item() == mean_of(live)


def test_a_replay_waits_for_its_update() -> None:
    graph, out = capture(attention([3]), auto_dispatch_capture=True)
    graph.replay()
    with pytest.raises(RuntimeError, match="waits for the update of its task groups"):
        torch.npu.synchronize()
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [6]}])
    torch.npu.synchronize()
    assert out.flatten()[0].item() == mean_of(6)


def test_nothing_that_needs_a_waiting_replay_passes() -> None:
    x = device(1, 2)
    other, _ = capture(lambda: x + 1)
    graph, _ = capture(attention([3]), auto_dispatch_capture=True)
    graph.replay()
    for call in (other.replay, graph.replay, lambda: x + 1, x.tolist):
        with pytest.raises(RuntimeError, match="waits for the update of its task groups"):
            call()
    graph.reset()  # nor does it wait any more
    assert (x + 1).tolist() == [2, 3]


def test_a_graph_is_updated_alone_when_others_have_gone() -> None:
    gone, _ = capture(attention([3]), auto_dispatch_capture=True)
    kept, out = capture(attention([3]), auto_dispatch_capture=True)
    gone.reset()
    new, other = capture(attention([3]), auto_dispatch_capture=True)
    for graph, live in ((kept, 5), (new, 7)):
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [live]}])
        graph.replay()
    assert (out.flatten()[0].item(), other.flatten()[0].item()) == (mean_of(5), mean_of(7))


@pytest.mark.parametrize("lengths", [[9], "text"], ids=["too long", "no number"])
def test_an_update_that_fails_is_over_and_changes_nothing(lengths: Any) -> None:
    """What comes after it is no part of it."""
    graph, out = capture(attention([3]), auto_dispatch_capture=True)
    out.fill_(-1)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])
    assert device(1, 2).add_(1).tolist() == [2, 3]
    assert (out == -1).all()
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [4]}])
    graph.replay()
    assert out.flatten()[0].item() == mean_of(4)


# ---- torch.compile -----------------------------------------------------------------------------------------------
@pytest.fixture
def compiler() -> Iterator[None]:
    # torch_npu's own order: once npugraph_ex has set its rules up, torchair cannot set up its own in that process.
    torchair.get_npu_backend(compiler_config=CompilerConfig())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_function_through_npugraph_ex(dynamic: bool) -> None:
    def function(x: Tensor, w: Tensor, total: Tensor) -> Tensor:
        total.add_(x.sum())
        return torch.nn.functional.silu(x @ w) + 1

    run = torch.compile(function, backend="npugraph_ex", fullgraph=True, dynamic=dynamic)
    on_npu, on_cpu = torch.zeros(()).npu(), torch.zeros(())
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, w = torch.randn(3, 4, generator=generator), torch.randn(4, 5, generator=generator)
        got = run(x.npu(), w.npu(), on_npu)
        assert torch.allclose(got.cpu(), function(x, w, on_cpu), atol=1e-6)
        assert torch.allclose(on_npu.cpu(), on_cpu, atol=1e-6)


@pytest.mark.usefixtures("compiler")
def test_a_host_number_in_a_compiled_function_needs_no_new_capture() -> None:
    def function(x: Tensor, lengths: list[int]) -> Tensor:
        return torch.ops.npu.npu_fused_infer_attention_score(
            x[:, :1], x, x, num_heads=1, input_layout="BSND", scale=0.0, actual_seq_lengths_kv=lengths
        )[0]

    run = torch.compile(function, backend="npugraph_ex", fullgraph=True, dynamic=True)
    x = torch.arange(8.0).reshape(1, 8, 1, 1).expand(1, 8, 1, 16).contiguous().half().npu()
    torch._dynamo.mark_static(x)
    for live in (3, 4, 7):
        assert run(x, [live]).flatten()[0].item() == mean_of(live)
