from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from qwen2_npu.emulator.ge import engine
from qwen2_npu.emulator.ge.engine import Program, listeners
from qwen2_npu.emulator.ge.memory import Copies
from qwen2_npu.emulator.ge.proto import UnsupportedGraphError, parse
from tests.unit.emulator.ge.building import Make, build, compute, ge

Tensor = torch.Tensor


def data(*shape: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return torch.arange(float(count)).reshape(shape)


def scatter(var: Any, rows: int = 2) -> Any:
    """Writes 100 into the first column of ``var`` (rows, …)."""
    start = ge.Const([0] * rows, dtype=9)
    return ge.Scatter(var, start, ge.Fill([rows, 1], ge.Const(100.0)), reduce="update", axis=1)


WRITTEN = torch.tensor([[100.0, 1, 2], [100, 4, 5]])
ORIGINAL = data(2, 3)


# ---- writes in place ---------------------------------------------------------------------------------------------
def test_a_write_on_a_data_node_is_seen_by_the_caller() -> None:
    x = data(2, 3)
    (out,) = compute(scatter, x)
    assert torch.equal(x, WRITTEN)
    assert out.data_ptr() == x.data_ptr()


def test_a_write_on_a_copy_is_not() -> None:
    x = data(2, 3)
    (out,) = compute(lambda x: scatter(ge.TensorMove(x)), x)
    assert torch.equal(x, ORIGINAL)
    assert torch.equal(out, WRITTEN)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: ge.Identity(x),
        lambda x: ge.Reshape(x, [2, 3]),
        lambda x: ge.StridedSliceV2(x, [0, 0], [2, 3], None, None),
        lambda x: ge.Cast(x, dst_type=0),
        lambda x: ge.Squeeze(ge.Unsqueeze(x, axes=[0]), axis=[0]),
    ],
    ids=["identity", "reshape", "slice", "cast", "twice"],
)
def test_a_write_on_a_view_is_not(view: Make) -> None:
    x = data(2, 3)
    (out,) = compute(lambda x: scatter(view(x)), x)
    assert torch.equal(x, ORIGINAL)
    assert torch.equal(out, WRITTEN)


def test_who_reads_a_data_node_sees_what_is_in_it() -> None:
    def make(x: Any) -> list[Any]:
        before = ge.Neg(x)
        scatter(x)
        return [before, ge.Neg(x)]

    before, after = compute(make, data(2, 3))
    assert torch.equal(before, -ORIGINAL)
    assert torch.equal(after, -WRITTEN)


def test_a_control_edge_makes_a_reader_wait_for_the_write() -> None:
    def make(x: Any) -> Any:
        reader = ge.Neg(x)
        reader.node.input.append(scatter(x).controller)
        return reader

    (got,) = compute(make, data(2, 3))
    assert torch.equal(got, -WRITTEN)


def later(make_view: Make) -> Make:
    """A view that is made before a write and read after it."""

    def make(x: Any) -> list[Any]:
        views = make_view(x)
        views = views if isinstance(views, list | tuple) else [views]
        scatter(x)
        return [ge.Neg(view) for view in views]

    return make


VIEWS: dict[str, tuple[Make, Any]] = {
    "Identity": (ge.Identity, lambda x: x),
    "Reshape": (lambda x: ge.Reshape(x, [3, 2]), lambda x: x.reshape(3, 2)),
    "Transpose": (lambda x: ge.Transpose(x, [1, 0]), lambda x: x.T),
    "StridedSliceV2": (lambda x: ge.StridedSliceV2(x, [0, 0], [2, 1], None, None), lambda x: x[:, :1]),
    "SplitV": (lambda x: ge.SplitV(x, [1, 1], 0, num_split=2), lambda x: x.split(1)),
    "BroadcastTo": (lambda x: ge.BroadcastTo(x, [4, 2, 3]), lambda x: x.expand(4, 2, 3)),
    "twice": (lambda x: ge.Transpose(ge.Reshape(x, [3, 2]), [1, 0]), lambda x: x.reshape(3, 2).T),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_value_stays_what_it_was_when_its_source_is_written(name: str) -> None:
    make, reference = VIEWS[name]
    got = compute(later(make), data(2, 3))
    want = reference(ORIGINAL)
    for have, value in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(have, -value)


def test_without_its_copy_the_value_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "plan_copies", lambda accesses, *_: [Copies() for _ in accesses])
    (got,) = compute(later(ge.Identity), data(2, 3))
    assert torch.equal(got, -WRITTEN)


def test_a_returned_value_stays_what_it_was() -> None:
    def make(x: Any) -> Any:
        row = ge.Reshape(x, [6])
        scatter(x)
        return row

    (got,) = compute(make, data(2, 3))
    assert torch.equal(got, ORIGINAL.reshape(6))


def test_memory_can_be_assigned_a_view_of_itself() -> None:
    x = data(3, 3)
    compute(lambda x: ge.Assign(x, ge.Transpose(x, [1, 0])), x)
    assert torch.equal(x, data(3, 3).T)


def test_an_in_place_operator_shares_its_producers_memory() -> None:
    # As GE does, where the producer is no constant: who reads it later reads what was written.
    def make(x: Any) -> list[Any]:
        produced = ge.Neg(x)
        scatter(produced)
        return [ge.Abs(produced)]

    (got,) = compute(make, data(2, 3))
    assert torch.equal(got, WRITTEN)


def test_rotary_embedding_overwrites_its_inputs_unless_they_are_copies() -> None:
    tensors = [torch.ones(1, 2, heads, 64) for heads in (2, 1)] + [torch.zeros(1, 2, 1, 64) for _ in range(2)]

    def make(*given: Any, copied: bool) -> Any:
        query, key, cos, sin = given
        if copied:
            query, key = ge.TensorMove(query), ge.TensorMove(key)
        return ge.ApplyRotaryPosEmb(query, key, cos, sin)

    compute(lambda *given: make(*given, copied=True), *tensors)
    assert all((tensor == 1).all() for tensor in tensors[:2])
    compute(lambda *given: make(*given, copied=False), *tensors)
    assert all((tensor == 0).all() for tensor in tensors[:2])


def test_constants_survive_in_place_operators() -> None:
    def make(y: Any) -> list[Any]:
        constant = ge.Const(ORIGINAL)
        return [scatter(constant), ge.Add(constant, y)]

    program = Program.plan("test", parse(build(make, data(2, 3))))
    for _ in range(2):
        written, read = program.run([torch.zeros(2, 3)])
        assert torch.equal(written, WRITTEN)
        assert torch.equal(read, ORIGINAL)


# ---- running -----------------------------------------------------------------------------------------------------
def test_values_die_after_their_last_reader() -> None:
    """Or the step after, where there is none."""
    alive: list[weakref.ref[Tensor]] = []
    count: list[int] = []

    def watch(node: Any, run: Any, values: list[Any]) -> Any:
        count.append(sum(ref() is not None for ref in alive))
        results = run(values)
        alive.append(weakref.ref(results[0]))
        return results

    def chain(x: Any) -> Any:
        for _ in range(5):
            ge.Abs(x)
            x = ge.Neg(x)
        return x

    listeners.append(watch)
    try:
        compute(chain, data(4))
    finally:
        listeners.remove(watch)
    assert count == [0, 1, *[1, 2] * 4]  # what ran last is still at hand


def test_a_listener_can_stand_in_for_a_node() -> None:
    def fault(node: Any, run: Any, values: list[Any]) -> Any:
        results = run(values)
        return tuple(result * float("nan") for result in results) if node.type == "Neg" else results

    listeners.append(fault)
    try:
        spoiled, whole = compute(lambda x: [ge.Neg(x), ge.Abs(x)], data(2))
    finally:
        listeners.remove(fault)
    assert spoiled.isnan().all()
    assert torch.equal(whole, data(2))


def test_data_nodes_are_found_by_index_wherever_they_stand() -> None:
    graph = build(lambda x, y: ge.Sub(x, y), data(2), data(2))
    nodes = parse(graph)
    (got,) = Program.plan("test", nodes[::-1]).run([torch.full((2,), 5.0), torch.ones(2)])
    assert got.tolist() == [4, 4]


def test_a_symbol_is_a_number() -> None:
    def make(rows: Any, x: Any) -> Any:
        return ge.Reshape(x, ge.Pack([rows, -1], N=2, axis=0))

    program = Program.plan("test", parse(build(make, torch.tensor(2), data(6))))
    assert program.run([torch.tensor([3]), data(6)])[0].shape == (3, 2)  # torchair passes a vector of one


def test_an_output_may_be_an_input_a_constant_or_the_same_twice() -> None:
    x = data(2)
    got = compute(lambda x: [x, ge.Const(2.0), x], x)
    assert [value.tolist() for value in got] == [[0, 1], 2.0, [0, 1]]


def test_empty_tensors() -> None:
    (got,) = compute(lambda x, y: ge.MatMul(x, y, None), torch.ones(0, 3), torch.ones(3, 2))
    assert got.shape == (0, 2)


# ---- refusals ----------------------------------------------------------------------------------------------------
def test_an_operator_that_the_table_lacks_is_named_when_the_graph_is_planned() -> None:
    graph = build(lambda x: ge.Cholesky(x), data(2, 2))
    with pytest.raises(UnsupportedGraphError, match=r"GE operator Cholesky \(Cholesky\)"):
        Program.plan("test", parse(graph))


def test_a_missing_input_is_named() -> None:
    program = Program.plan("test", parse(build(lambda x, y: ge.Add(x, y), data(2), data(2))))
    with pytest.raises(ValueError, match="'test' has an input 1, and 1 are given"):
        program.run([data(2)])


def test_a_failing_operator_is_named_with_its_inputs() -> None:
    with pytest.raises(RuntimeError, match=r"GE operator Add \(Add\) failed on \(2,\) torch.float32, \(3,\) torch.fl"):
        compute(lambda x, y: ge.Add(x, y), data(2), data(3))


def test_another_dtype_than_promised_is_an_error() -> None:
    def make(x: Any) -> Any:
        out = ge.Neg(x)
        out.set_meta(torch.ones(2, dtype=torch.float16))
        return out

    with pytest.raises(RuntimeError, match=r"Neg.*computed torch.float32, and the graph declares torch.float16"):
        compute(make, data(2))


def test_a_graph_without_outputs_is_refused() -> None:
    nodes = [node for node in parse(build(ge.Neg, data(2))) if node.type != "NetOutput"]
    with pytest.raises(UnsupportedGraphError, match="'test' has no NetOutput"):
        Program.plan("test", nodes)


def test_an_output_that_a_node_does_not_have_is_refused() -> None:
    graph = build(ge.Neg, data(2))
    graph.op[-1].input[0] = "Neg:1"
    with pytest.raises(UnsupportedGraphError, match="Neg:1, and Neg has no such output"):
        Program.plan("test", parse(graph))


# ---- several of a kind -------------------------------------------------------------------------------------------
def test_each_output_keeps_the_promised_dtype() -> None:
    def make(x: Any) -> Any:
        outputs = ge.SplitV(x, [1, 1], 0, num_split=2)
        outputs[1].set_meta(torch.ones(1, dtype=torch.float16))
        return outputs

    with pytest.raises(RuntimeError, match=r"SplitV.*computed torch.float32, and the graph declares torch.float16"):
        compute(make, data(2))


def test_every_listener_is_called_the_last_one_first() -> None:
    called: list[str] = []

    def listener(name: str) -> Any:
        return lambda node, run, values: (called.append(name), run(values))[1]

    added = [listener(name) for name in "ab"]
    listeners.extend(added)
    try:
        compute(lambda x: ge.Neg(x), data(2))
    finally:
        for one in added:
            listeners.remove(one)
    assert called == ["b", "a"]


def test_a_write_on_a_data_node_with_strides_is_seen_by_the_caller() -> None:
    x = data(3, 2).T
    wanted = x.clone()
    wanted[:, 0] = 100
    compute(scatter, x)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16], ids=str)
def test_a_returned_constant_has_its_dtype(dtype: torch.dtype) -> None:
    (got,) = compute(lambda x: ge.Const(torch.tensor([0, 1]).to(dtype)), data(2))
    assert torch.equal(got, torch.tensor([0, 1]).to(dtype))
    assert got.dtype is dtype
