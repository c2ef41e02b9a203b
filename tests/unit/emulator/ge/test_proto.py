from __future__ import annotations

from typing import Any

import pytest
import torch
from torchair._ge_concrete_graph.ge_ir_pb2 import AttrDef
from torchair._ge_concrete_graph.ge_ir_pb2 import DataType as ProtoDataType
from torchair.ge._ge_graph import DataType, ge_type_to_torch_type

from qwen2_npu.emulator.ge.proto import (
    ATTRIBUTE_DTYPES,
    DTYPES,
    Edge,
    Node,
    UnsupportedGraphError,
    attribute,
    attribute_dtype,
    parse,
)
from tests.unit.emulator.ge.building import build, ge

X = torch.ones(2, 3)


def node_of(graph: object, type_: str) -> Node:
    (found,) = [node for node in parse(graph) if node.type == type_]
    return found


@pytest.mark.parametrize(("number", "name"), ATTRIBUTE_DTYPES.items())
def test_attribute_dtypes_are_torchairs(number: int, name: str) -> None:
    assert getattr(DataType, name) == number
    assert attribute_dtype(number) is ge_type_to_torch_type(number)


def test_every_dtype_has_a_number_of_each_kind() -> None:
    assert set(ATTRIBUTE_DTYPES.values()) == DTYPES.keys()
    assert DTYPES.keys() <= set(ProtoDataType.keys())


def test_another_dtype_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match="data type 29"):
        attribute_dtype(DataType.DT_INT4)


@pytest.mark.parametrize("dtype", [*DTYPES.values()], ids=str)
def test_constants_keep_their_bytes(dtype: torch.dtype) -> None:
    value = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    node = node_of(build(lambda: ge.Const(value)), "Const")
    assert torch.equal(node.attributes["value"], value)
    assert node.attributes["value"].dtype is dtype


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)], ids=str)
def test_constants_of_any_shape(shape: tuple[int, ...]) -> None:
    node = node_of(build(lambda: ge.Const(torch.ones(shape))), "Const")
    assert node.attributes["value"].shape == shape


def test_a_constant_with_bytes_to_spare_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"shape \(2,\).*24 bytes"):
        parse(build(lambda: ge.Const(torch.ones(6)[:2])))


def test_inputs_that_are_not_fed_are_none() -> None:
    node = node_of(build(lambda x: ge.StridedSliceV2(x, [0], [1], None, None), X), "StridedSliceV2")
    assert node.inputs[3:] == (None, None)
    assert node.input_names == ("x", "begin", "end", "axes", "strides")


def test_control_edges_do_not_shift_the_inputs() -> None:
    def make(x: ge.Tensor, y: ge.Tensor) -> list[ge.Tensor]:
        first = ge.Neg(x)
        before = ge.Sub(x, y, dependencies=[first])  # torchair puts these in front
        after = ge.Add(x, y)
        after.node.input.append(first.controller)  # and those of its events behind
        return [before, after]

    graph = build(make, X, X)
    for type_ in ("Sub", "Add"):
        node = node_of(graph, type_)
        assert node.after == ("Neg",)
        assert dict(zip(node.input_names, node.inputs, strict=True)) == {"x1": Edge("arg0", 0), "x2": Edge("arg1", 0)}


def test_an_output_with_an_inputs_name_is_that_input() -> None:
    graph = build(lambda x, y: [ge.Assign(x, y), *ge.AddRmsNorm(x, y, y)], X, X)
    assert node_of(graph, "Assign").references == {0: 0}
    assert node_of(graph, "AddRmsNorm").references == {}


def test_only_what_torch_will_read_is_promised() -> None:
    def make(x: ge.Tensor) -> ge.Tensor:
        out = ge.Neg(ge.Abs(x))
        out.set_meta(torch.ones(2, 3, dtype=torch.float16))
        return out

    graph = build(make, X)
    assert node_of(graph, "Abs").promised == (None,)
    assert node_of(graph, "Neg").promised == (torch.float16,)


def test_all_control_edges_are_kept() -> None:
    def make(x: ge.Tensor) -> ge.Tensor:
        return ge.Exp(x, dependencies=[ge.Neg(x), ge.Abs(x)])

    assert set(node_of(build(make, X), "Exp").after) == {"Neg", "Abs"}


@pytest.mark.parametrize(
    ("field", "items"), [("i", [3, 0]), ("f", [0.5]), ("b", [False, True]), ("s", [b"a", b""]), ("dt", [1, 3])]
)
def test_lists_of_every_kind_are_read(field: str, items: list[Any]) -> None:
    value = AttrDef()
    getattr(value.list, field).extend(items)
    assert attribute(value) == [item.decode() if isinstance(item, bytes) else item for item in items]
