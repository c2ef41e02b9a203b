from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qwen2_npu.emulator.ge import graph as module
from qwen2_npu.emulator.ge.graph import EmulatedGraph
from tests.unit.emulator.ge.building import build, ge, load

Tensor = torch.Tensor


def device(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).npu()


def memory(tensor: Tensor) -> int:
    return tensor.data_ptr()


def test_outputs_are_new_tensors_on_the_card_of_the_inputs() -> None:
    x = torch.arange(2.0).to("npu:1")
    same, negative = load(lambda x: [x, ge.Neg(x)], x).run([x])
    assert (same.device, negative.device) == (x.device, x.device)
    assert same.tolist() == [0, 1]
    assert memory(same) != memory(x)
    same.fill_(7)
    assert x.tolist() == [0, 1]


def test_one_value_returned_twice_is_two_tensors() -> None:
    x = device(1, 2)

    def make(x: Any) -> list[Any]:
        y = ge.Neg(x)
        return [y, y]

    first, second = load(make, x).run([x])
    first.fill_(0)
    assert second.tolist() == [-1, -2]


def test_outputs_are_dense() -> None:
    x = torch.arange(6.0).reshape(2, 3).npu()
    (out,) = load(lambda x: ge.Transpose(x, [1, 0]), x).run([x])
    assert out.is_contiguous()
    assert torch.equal(out.cpu(), x.cpu().T)


def test_an_assigned_output_goes_to_its_memory() -> None:
    x, target = device(1, 2), device(0, 0)
    before = memory(target)
    (out,) = load(ge.Neg, x).run([x], [target])
    assert out is target
    assert memory(target) == before
    assert target.tolist() == [-1, -2]


def test_assigned_to_an_input_it_is_written_after_the_last_reader() -> None:
    x = device(1, 2)

    def make(x: Any) -> list[Any]:
        new = ge.Neg(x)
        return [new, ge.Mul(x, ge.Const(10.0)), ge.Reshape(x, [2])]

    _, product, old = load(make, x).run([x], [x, None, None])
    assert x.tolist() == [-1, -2]
    assert product.tolist() == [10, 20]
    assert old.tolist() == [1, 2]


def test_inputs_can_swap_their_contents() -> None:
    x, y = device(1, 2), device(3, 4)
    load(lambda x, y: [y, x], x, y).run([x, y], [x, y])
    assert (x.tolist(), y.tolist()) == ([3, 4], [1, 2])


def test_a_write_in_place_and_its_assignment_are_one() -> None:
    x = torch.zeros(2, 3).npu()
    start = torch.tensor([0, 2]).npu()
    step = torch.ones(2, 1).npu()
    graph = load(lambda x, i, u: ge.Scatter(x, i, u, reduce="update", axis=1), x, start, step)
    (out,) = graph.run([x, start, step], [x])
    assert out is x
    assert x.tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("type_", ["Data", "RefData"])
def test_reference_data_is_the_callers_memory(type_: str) -> None:
    x, y = device(1, 2), device(3, 4)
    graph = build(ge.Assign, x, y)
    for op in graph.op:
        if op.name == "arg0":
            op.type = type_
    emulated = EmulatedGraph("test")
    emulated.load(graph)
    emulated.run([x, y])
    assert x.tolist() == [3, 4]


def test_a_frozen_parameter_is_read_where_it_lies() -> None:
    weight, x = torch.arange(6.0).reshape(2, 3).npu(), device(1, 2)

    def make(x: Any) -> Any:
        frozen = ge.ConstPlaceHolder(
            origin_shape=[2, 3], origin_format=2, storage_shape=[2, 3], storage_format=2, expand_dim_rules="",
            dtype=0, addr=weight.data_ptr(), size=weight.numel() * 4,
        )  # fmt: skip
        frozen.node.attr["dtype"].dt = 0
        return ge.MatMul(ge.Unsqueeze(x, axes=[0]), frozen, None)

    graph = load(make, x)
    assert graph.run([x])[0].tolist() == [[6, 9, 12]]
    weight.fill_(1)
    assert graph.run([x])[0].tolist() == [[3, 3, 3]]


def test_host_and_device_inputs_mix() -> None:
    x = device(1, 2, 3, 4)
    graph = load(lambda shape, x: ge.Reshape(x, shape), torch.tensor([2, 2]), x)
    assert graph.run([torch.tensor([4, 1]), x])[0].shape == (4, 1)


def test_graphs_do_not_disturb_one_another() -> None:
    x = device(1, 2)
    negative, absolute = load(ge.Neg, x), load(ge.Abs, x)
    (first,) = negative.run([x])
    (second,) = absolute.run([first])
    (third,) = negative.run([second])
    assert [value.tolist() for value in (first, second, third)] == [[-1, -2], [1, 2], [-1, -2]]


def test_no_gradient_is_recorded() -> None:
    x = device(1, 2).requires_grad_()
    assert not load(ge.Neg, x).run([x])[0].requires_grad


def test_a_graph_must_be_loaded_first() -> None:
    with pytest.raises(RuntimeError, match="'g' is run before it is loaded"):
        EmulatedGraph("g").run([])


@pytest.fixture
def seen() -> Iterator[list[str]]:
    names: list[str] = []

    def note(name: str, graph: Any, options: dict[str, str]) -> None:
        names.append(name)

    module.loaded.append(note)
    yield names
    module.loaded.remove(note)


def test_who_counts_graphs_is_told(seen: list[str]) -> None:
    load(ge.Neg, device(1))
    assert seen == ["test"]
