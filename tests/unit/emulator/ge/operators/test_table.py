"""The table against the operators' prototypes, which torchair carries as text, and against its own tests."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchair._ge_concrete_graph.auto_generated_ge_raw_ops as generated
import torchair._ge_concrete_graph.dynamic_output_ops as dynamic
import torchair.ge._ge_graph as basic

from qwen2_npu.emulator.ge import operators
from qwen2_npu.emulator.ge.engine import Program
from qwen2_npu.emulator.ge.operators.table import REQUIRED, TABLE, GEOperator, Ints, Tensor, operator
from qwen2_npu.emulator.ge.proto import Edge, Node, UnsupportedGraphError, parse
from tests.unit.emulator.ge.building import build
from tests.unit.emulator.ge.operators import (
    test_activations,
    test_attention,
    test_creation,
    test_elementwise,
    test_indexing,
    test_normalization,
    test_products,
    test_reductions,
    test_shapes,
)
from tests.unit.emulator.ge.operators.beyond_qwen2 import test_activations as more_activations
from tests.unit.emulator.ge.operators.beyond_qwen2 import (
    test_convolutions,
    test_images,
    test_losses,
    test_padding,
    test_random,
)
from tests.unit.emulator.ge.operators.beyond_qwen2 import test_normalization as more_normalization
from tests.unit.emulator.ge.operators.cases import Case

CASES: list[Case] = [
    case
    for module in (
        test_activations, test_creation, test_elementwise, test_indexing, test_normalization, test_products,
        test_reductions, test_shapes, more_activations, more_normalization, test_convolutions, test_images,
        test_losses, test_padding,
    )
    for case in module.CASES
]  # fmt: skip

TESTED = {case.type for case in CASES} | test_attention.TESTED | test_random.TESTED.keys()

OF_SEVERAL_RANKS = {name for name, entry in TABLE.items() if entry.function.__module__.endswith(".collectives")}
"""Tested in tests/unit/emulator/collectives, in several processes."""

BEYOND_PROTOTYPE = {
    "TopKV2": {"sort_policy"},
    "MoeFinalizeRoutingV2": {"k"},
    "WeightQuantBatchMatmulV2": {"antiquant_group_size", "dtype"},
    "QuantBatchMatmulV3": {"group_size"},
}
"""Attributes that torchair sets and the prototype does not name."""


def test_every_operator_has_a_test() -> None:
    assert TABLE.keys() - TESTED - OF_SEVERAL_RANKS == set()
    assert TESTED - TABLE.keys() == set()


def test_an_operator_without_a_test_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "Untested", TABLE["Add"])
    with pytest.raises(AssertionError, match="Untested"):
        test_every_operator_has_a_test()


@cache
def prototypes() -> dict[str, list[tuple[str, str, str]]]:
    """Operator -> (INPUT | OPTIONAL_INPUT | … | ATTR | REQUIRED_ATTR, name, the rest of the line)."""
    text = "".join(Path(module.__file__).read_text() for module in (generated, dynamic, basic))
    lines = re.compile(r"^\s*\.(\w*(?:INPUT|OUTPUT|ATTR))\((\w+)(?:,\s*(.*?))?\)?(?:\\n)?$", re.MULTILINE)
    found = re.findall(r'"""\s*REG_OP\((\w+)\)(.*?)"""', text, re.DOTALL)
    return {name: lines.findall(body) for name, body in found}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_inputs_and_attributes_are_the_prototypes(name: str) -> None:
    entry, prototype = TABLE[name], prototypes()[name]
    inputs = {what: kind for kind, what, _ in prototype if kind.endswith("INPUT")}
    for parameter in entry.parameters:
        assert parameter.name in inputs, parameter.name
        assert (parameter.kind == "tensors") == (inputs[parameter.name] == "DYNAMIC_INPUT"), parameter.name
        assert parameter.optional <= (inputs[parameter.name] == "OPTIONAL_INPUT"), parameter.name
    taken = {parameter.name for parameter in entry.parameters}
    required = {what for what, kind in inputs.items() if kind != "OPTIONAL_INPUT"}
    assert required <= taken
    attributes = {what: rest for kind, what, rest in prototype if kind.endswith("ATTR")}
    known = entry.attributes.keys() | entry.fixed.keys()
    assert known - BEYOND_PROTOTYPE.get(name, set()) == attributes.keys()


@pytest.mark.parametrize("name", sorted(TABLE))
def test_defaults_are_the_prototypes(name: str) -> None:
    text = {what: (kind, rest.split(",", 1)[-1].strip()) for kind, what, rest in prototypes()[name] if "ATTR" in kind}
    for attribute, default in TABLE[name].attributes.items():
        if attribute in BEYOND_PROTOTYPE.get(name, set()):
            continue
        kind, value = text[attribute]
        if default is REQUIRED:
            assert kind == "REQUIRED_ATTR", attribute
        else:
            assert kind == "ATTR", attribute
            assert default == literal(value), attribute


SAME_IN_ALL_CASES = {
    ("ReduceMean", "noop_with_empty_axes"): "torchair leaves it at its default, and means all dimensions by no axes",
    ("TopKV2", "sorted"): "results in any order have no reference",
    ("MirrorPad", "mode"): "REFLECT alone is emulated",
}
"""(operator, attribute) -> why the cases below do not vary it."""


def plain(value: Any) -> str:
    """A value of an attribute, the same text for the same value: graphs hold lists, and floats in 32 bits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(list(value)) if isinstance(value, list | tuple) else str(value)


def test_every_attribute_takes_several_values() -> None:
    """Another than its default, or several where there is none: one that is ignored would not be seen else."""
    values: dict[tuple[str, str], set[str]] = {}
    for case in CASES:
        for made in parse(build(case.make, *case.inputs)):
            for name, default in TABLE[made.type].attributes.items() if made.type == case.type else ():
                known = values.setdefault((made.type, name), set() if default is REQUIRED else {plain(default)})
                known.add(plain(made.attributes.get(name, default)))
    same = {key for key, found in values.items() if len(found) == 1}
    assert same == SAME_IN_ALL_CASES.keys()


def test_an_attribute_of_one_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CASES", [case for case in CASES if case.note != "base 2"])
    test_every_attribute_takes_several_values()  # base 10 is left
    monkeypatch.setattr(sys.modules[__name__], "CASES", [case for case in CASES if not case.note.startswith("base")])
    with pytest.raises(AssertionError, match="base"):
        test_every_attribute_takes_several_values()


DTYPES = {"DT_FLOAT": 0, "DT_INT32": 3, "DT_INT64": 9, "DT_COMPLEX64": 16}


def literal(text: str) -> Any:
    """A default as C++ writes it."""
    if text.startswith(("{", "[")):
        return tuple(int(number) for number in text.strip("{[]} ").split(",") if number.strip())
    if text.startswith('"'):
        return text.strip('"')
    if text in ("true", "false"):
        return text == "true"
    if text in DTYPES:
        return DTYPES[text]
    return float(text.rstrip("f")) if "." in text or "e" in text else int(text)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_share_memory_only_where_declared(case: Case) -> None:
    """A view that is not declared would change when its base is written; an in-place operator must be in place."""
    program = Program.plan("test", parse(build(case.make, *case.inputs)))
    seen: set[str] = set()

    def watch(step: Any, given: list[Any], results: tuple[Tensor, ...]) -> None:
        node, entry = step.node, TABLE[step.node.type]
        seen.add(node.type)
        for index, result in enumerate(results):
            sharing = {
                name
                for name, value in zip(node.input_names, given, strict=True)
                if isinstance(value, Tensor) and result.numel() and same_storage(value, result)
            }
            if index in node.references:
                assert sharing == {node.input_names[node.references[index]]}
            elif sharing:
                assert sharing == {entry.views}

    run_watched(program, case.inputs, watch)
    assert case.type in seen


def run_watched(program: Program, inputs: tuple[Tensor, ...], watch: Any) -> None:
    values: list[Any] = list(program.initial)
    for index, slot, scalar in program.data:
        values[slot] = inputs[index].reshape(()) if scalar else inputs[index]
    for step in program.steps:
        given = [None if slot is None else values[slot] for slot in step.reads]
        results = step.run(given)
        watch(step, given, results)
        for slot, result in zip(step.makes, results, strict=True):
            values[slot] = result


def same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def node(type_: str, *names: str, attributes: dict[str, Any] | None = None) -> Node:
    edges = tuple(Edge(f"from_{name}", 0) for name in names)
    return Node("node", type_, edges, names, (), {}, attributes or {}, (None,), ((),))


def entry_of(function: Any, **options: Any) -> GEOperator:
    """The function as an entry, outside the table."""
    try:
        operator("OnTrial", **options)(function)
        return TABLE["OnTrial"]
    finally:
        del TABLE["OnTrial"]


def test_an_unknown_operator_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"GE operator Cholesky \(node\) is not in the emulator's table"):
        operators.find(node("Cholesky"))


def test_an_operator_is_entered_once() -> None:
    with pytest.raises(ValueError, match="Add is in the table twice"):
        operator("Add")(lambda x1, x2: x1)


def test_host_numbers_of_constants_are_read_once() -> None:
    def permute(x: Tensor, perm: Ints) -> Tensor:
        return x.permute(perm)

    perm = torch.tensor([1, 0])
    kernel = entry_of(permute).bind(node("OnTrial", "x", "perm"), {Edge("from_perm", 0): perm})
    perm.copy_(torch.tensor([0, 1]))
    assert kernel([torch.ones(2, 3), None]).shape == (3, 2)


def test_any_number_of_inputs_is_collected_by_name() -> None:
    def join(x: list[Tensor], x_extra: Tensor | None, last: Tensor) -> Tensor:
        return torch.stack([*x, last])

    kernel = entry_of(join).bind(node("OnTrial", "x0", "x1", "last"), {})
    assert kernel([torch.tensor(1), torch.tensor(2), torch.tensor(3)]).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (node("OnTrial", "x", "bias", attributes={"scale": 1.0}), "input bias is not emulated"),
        (node("OnTrial", attributes={"scale": 1.0}), "input x is not fed"),
        (node("OnTrial", "x", attributes={"axis": 1}), "lacks attribute scale"),
        (node("OnTrial", "x", attributes={"scale": 1.0, "mood": 2}), "attribute mood is not emulated"),
        (node("OnTrial", "x", attributes={"scale": 1.0, "mode": 3}), "with mode=3 is not emulated; only mode=0 is"),
    ],
)
def test_what_an_operator_cannot_honour_is_refused_when_it_is_bound(made: Node, message: str) -> None:
    def scaled(x: Tensor, *, scale: float, axis: int = 0) -> Tensor:
        return x * scale

    with pytest.raises(UnsupportedGraphError, match=rf"GE operator OnTrial \(node\).*{message}"):
        entry_of(scaled, fixed={"mode": 0}).bind(made, {})


def test_torchairs_own_marks_are_no_attributes() -> None:
    kernel = entry_of(lambda x: x + 1).bind(
        node("OnTrial", "x", attributes={"input_layout_info": ["NCHW"], "nn_module_stack": "…"}), {}
    )
    assert kernel([torch.tensor(1)]).item() == 2
