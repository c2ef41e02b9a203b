"""The comparison of one output with its golden: each rule alone, at its limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.operators import CATALOGUE, Expected, check, one_rank
from qwen2_npu.conformance.operators.check import (
    ElementMismatch,
    by_name,
    call,
    compare,
    compare_all,
    find_problems,
    operator_of,
    run_and_compare,
    side_effects,
    snippet,
    to_tensors,
    wrong_dtypes,
)
from qwen2_npu.conformance.operators.record import OneRank, OperatorRecord

INF, NAN = float("inf"), float("nan")
VALUE = np.array([[1.0, -2.0, 0.0], [4.0, 8.0, -16.0]])
BOUND = np.array([[0.5, 0.25, 0.125], [1.0, 2.0, 4.0]])
EVERY = [tuple(int(i) for i in index) for index in np.ndindex(*VALUE.shape)]


def out(value: Any = VALUE, **changes: Any) -> Expected:
    return Expected("out", value, **changes)


# ---- values ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("place", EVERY)
def test_each_element_may_be_off_by_its_own_bound_and_no_more(place: tuple[int, int], sign: int) -> None:
    got = VALUE.copy()
    got[place] += sign * BOUND[place]
    assert compare(out(bound=BOUND), got) is None
    got[place] += sign * 2.0**-30
    found = compare(out(bound=BOUND), got)
    assert found is not None
    assert found.problem.startswith(
        f"1 of 6 elements out of bounds, worst at {place}: got {float(got[place])!r}, want "
    )
    assert f"error {BOUND[place] + 2.0**-30:.3e}, bound {BOUND[place]:.3e}" in found.problem


@pytest.mark.parametrize("place", EVERY)
def test_without_a_bound_each_element_is_exact(place: tuple[int, int]) -> None:
    assert compare(out(), VALUE.copy()) is None
    got = VALUE.copy()
    got[place] = np.nextafter(got[place], INF)
    found = compare(out(), got)
    assert found is not None
    assert f"worst at {place}" in found.problem


def test_the_worst_element_is_the_one_furthest_beyond_its_bound() -> None:
    got = VALUE.copy()
    got[0, 1] += 0.5  # twice its bound
    got[1, 2] += 5.0  # a larger error, and 1.25 times its bound
    found = compare(out(bound=BOUND), got)
    assert found is not None
    assert found.problem.startswith("2 of 6 elements out of bounds, worst at (0, 1)")


@pytest.mark.parametrize("place", EVERY)
@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_what_is_not_finite_is_a_fault_anywhere_defined_or_not(odd: float, place: tuple[int, int]) -> None:
    got = VALUE.copy()
    got[place] = odd
    found = compare(out(bound=np.full(VALUE.shape, INF)), got)
    assert found is not None
    assert found.problem == f"1 elements not finite, first at {place}: {odd}, want {float(VALUE[place])!r}"
    defined = np.ones(VALUE.shape, bool)
    defined[place] = False
    found = compare(out(defined=defined), got)
    assert found is not None
    assert found.problem.endswith("not defined by the documentation, but must be finite")


@pytest.mark.parametrize(
    ("golden", "got", "passed"), [(INF, INF, True), (INF, -INF, False), (INF, NAN, False), (INF, 1.0, False)]
)
def test_an_infinity_of_the_golden_is_asked_for(golden: float, got: float, passed: bool) -> None:
    assert (compare(out(np.array([golden, 1.0])), np.array([got, 1.0])) is None) is passed


def test_what_is_not_defined_is_not_compared_and_all_else_is() -> None:
    defined = np.array([[True], [False]])
    got = VALUE.copy()
    got[1] += 100
    assert compare(out(defined=defined), got) is None
    got[0, 2] += 1e-9
    found = compare(out(defined=defined), got)
    assert found is not None
    assert found.problem.startswith("1 of 3 elements out of bounds, worst at (0, 2)")


def test_shapes_must_be_the_same_and_what_has_no_golden_is_not_compared() -> None:
    assert compare(out(None), np.full((5, 5), NAN)) is None
    assert compare(out(np.empty((0, 3))), np.empty((0, 3))) is None
    for shape in ((2, 4), (6,), (1, 2, 3), (0, 3)):
        found = compare(out(), np.zeros(shape))
        assert found == ElementMismatch("out", f"shape {shape}, expected (2, 3)")
    assert str(ElementMismatch("out", "what")) == "output 'out': what"


def test_every_output_is_compared_and_counted() -> None:
    right, wrong = VALUE.copy(), VALUE + 1
    names = [Expected(name, VALUE) for name in ("first", "second", "third")]
    assert compare_all(names, [right, right, right]) == []
    assert [found.output for found in compare_all(names, [wrong, right, wrong])] == ["first", "third"]
    for count in (2, 4):
        assert compare_all(names, [right] * count) == [ElementMismatch("*", f"{count} outputs, expected 3")]


# ---- dtypes and side effects ----------------------------------------------------------------------------------------
def test_each_output_has_the_dtype_under_test_or_its_own() -> None:
    expected = (out(), out(dtype="int64"), out())
    half, whole = torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.int64)
    assert wrong_dtypes(expected, (half, whole, half), "float16") == []
    assert wrong_dtypes(expected, (half, half, whole), "float16") == [
        "output 'out': dtype torch.float16, expected torch.int64",
        "output 'out': dtype torch.int64, expected torch.float16",
    ]
    assert wrong_dtypes(expected, (half.float(),), "float16") == [
        "output 'out': dtype torch.float32, expected torch.float16"
    ]


def record(*writes: str) -> OperatorRecord:
    return replace(CATALOGUE["npu_swiglu"], writes=writes)


Effect = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]


def overwrite(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    tensors["b"].view(torch.uint8)[-1] ^= 1  # the last bit of the last element
    return (torch.zeros(2),)


def negative_zero(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    tensors["a"][0] = -0.0
    return (torch.zeros(2),)


@pytest.mark.parametrize(
    ("writes", "effect", "problems"),
    [
        ((), lambda t: (torch.zeros(2),), []),
        ((), overwrite, ["argument 'b' was overwritten"]),
        ((), negative_zero, ["argument 'a' was overwritten"]),
        (("b",), overwrite, ["output 0 shares memory with [], expected ['b']"]),
        (("b",), lambda t: (t["b"],), []),
        (("a", "b"), lambda t: (t["a"], t["b"]), []),
        (("a", "b"), lambda t: (t["a"], torch.zeros(2)), ["output 1 shares memory with [], expected ['b']"]),
        (("a",), lambda t: (t["a"], t["b"]), ["output 1 shares memory with ['b'], expected []"]),
        (("a",), lambda t: (t["b"],), ["output 0 shares memory with ['b'], expected ['a']"]),
        ((), lambda t: (t["a"],), ["output 0 shares memory with ['a'], expected []"]),
        (("a",), lambda t: (torch.zeros(0),), []),
        (("a",), lambda t: (torch.zeros(0), t["b"]), ["output 1 shares memory with ['b'], expected []"]),
    ],
)
def test_arguments_are_left_alone_and_outputs_lie_where_they_must(
    writes: tuple[str, ...], effect: Effect, problems: list[str]
) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.ones(2), "empty": torch.zeros(0)}
    before = {name: value.clone() for name, value in tensors.items()}
    outputs = effect(tensors)
    assert side_effects(record(*writes), before, tensors, outputs) == problems


# ---- one sample -----------------------------------------------------------------------------------------------------
def test_arguments_as_the_operator_takes_them() -> None:
    whole, wide = np.array([[1, 2], [3, 4]]), np.array([[0.5, 1.0], [2.0, 4.0]])
    arguments = {"x": wide, "index": whole, "single": np.array([1.0]), "scale": 0.5, "text": "BSH", "none": None}
    for strided in (False, True):
        made = to_tensors(arguments, "bfloat16", strided=strided)
        assert (made["x"].dtype, made["index"].dtype) == (torch.bfloat16, torch.int64)
        assert made["x"].tolist() == wide.tolist()
        assert made["index"].tolist() == whole.tolist()
        assert [made[name].is_contiguous() for name in ("x", "index", "single")] == [not strided, not strided, True]
        assert (made["scale"], made["text"], made["none"]) == (0.5, "BSH", None)
    pair = to_tensors({"x": np.array([1.0, 2.0])}, "float32", strided=True)["x"]
    assert (pair.tolist(), pair.stride()) == ([1.0, 2.0], (2,))


def test_a_group_of_one_rank_is_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_rank, "communicator_name", lambda device: f"group of {device}")
    assert to_tensors({"hcom": OneRank()}, "float16", "meta")["hcom"] == "group of meta"


def sample() -> Any:
    return CATALOGUE["npu_swiglu"].samples[0].parameters


def right(**tensors: Any) -> torch.Tensor:
    gate, up = tensors["input"].double().chunk(2, dim=tensors.get("dim", -1))
    return (torch.nn.functional.silu(gate) * up).to(tensors["input"].dtype)


def test_find_problems_has_all_kinds_at_once() -> None:
    def wrong(**tensors: Any) -> torch.Tensor:
        tensors["input"].zero_()
        return tensors["input"].double()[..., ::2] + 1e3

    operator = CATALOGUE["npu_swiglu"]
    assert find_problems(operator, sample(), "float32", implementation=right) == []
    values, dtypes, effects = find_problems(operator, sample(), "float32", implementation=wrong)
    assert "elements out of bounds" in values
    assert "dtype torch.float64, expected torch.float32" in dtypes
    assert effects == "argument 'input' was overwritten"


def test_the_seed_the_dtype_and_strides_reach_the_sample() -> None:
    seen: list[torch.Tensor] = []

    def spy(**tensors: Any) -> torch.Tensor:
        seen.append(tensors["input"])
        return right(**tensors)

    check("npu_swiglu", sample(), implementation=spy)
    check("npu_swiglu", sample(), seed=0, implementation=spy)
    check("npu_swiglu", sample(), seed=1, implementation=spy)
    check("npu_swiglu", sample(), strided=True, implementation=spy)
    assert [tensor.dtype for tensor in seen] == [torch.float32] * 4
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], seen[3])
    assert [tensor.is_contiguous() for tensor in seen] == [True, True, True, False]
    find_problems(CATALOGUE["npu_swiglu"], sample(), "float16", seed=0, strided=True, implementation=spy)
    assert (seen[4].dtype, seen[4].is_contiguous()) == (torch.float16, False)


def test_the_operator_itself_is_run_where_none_is_given() -> None:
    operator = CATALOGUE["npu_swiglu"]
    arguments = operator.arguments(sample(), "float32")
    expected = operator.golden(arguments, "float32")
    shifted = [replace(each, value=each.value + 1e3) for each in expected]  # type: ignore[operator]
    assert run_and_compare(operator, arguments, expected, "float32") == []
    assert len(run_and_compare(operator, arguments, shifted, "float32")) == 1
    assert operator_of("npu_swiglu") is torch.ops.npu.npu_swiglu
    check("npu_swiglu", sample())


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_outputs_come_as_a_tuple_or_a_list(kind: type) -> None:
    problems = find_problems(
        CATALOGUE["npu_swiglu"], sample(), "float32", implementation=lambda **t: kind([right(**t)])
    )
    assert problems == []


def test_the_message_repeats_the_check() -> None:
    with pytest.raises(AssertionError) as raised:
        check("npu_swiglu", sample(), "float16", seed=3, strided=True, implementation=lambda **t: right(**t) + 1)
    first, problem, *script = str(raised.value).splitlines()
    assert first == "npu_swiglu (float16 on cpu) disagrees with its golden:"
    assert problem.startswith("  output 'out': ")
    assert "\n".join(script[1:]) == snippet("npu_swiglu", sample(), "float16", "cpu", 3, strided=True)
    assert script[-1].endswith("dtype='float16', device='cpu', seed=3, strided=True)")
    assert snippet("npu_swiglu", sample(), "float16", "cpu", 3).endswith("seed=3)")


@pytest.mark.parametrize("what", ["value", "bound"])
def test_a_golden_that_is_no_number_is_met_by_nothing(what: str) -> None:
    arrays = {"value": VALUE.copy(), "bound": BOUND.copy()}
    arrays[what][1, 1] = NAN
    found = compare(Expected("out", **arrays), VALUE + 0.0625)
    assert found is not None
    assert found.problem.startswith("1 of 6 elements out of bounds")


def test_one_element_is_compared_as_many_are() -> None:
    assert compare(out(np.array([2.0])), np.array([2.0])) is None
    found = compare(out(np.array([2.0])), np.array([3.0]))
    assert found is not None
    assert found.problem.startswith("1 of 1 elements out of bounds, worst at (0,): got 3.0, want 2.0")


def test_scalars_have_no_strides_and_nothing_is_strided_unless_asked_for() -> None:
    assert to_tensors({"x": np.array(2.0)}, "float32", strided=True)["x"].item() == 2.0
    assert to_tensors({"x": np.array([1.0, 2.0])}, "float32")["x"].is_contiguous()
    seen: list[torch.Tensor] = []

    def spy(**tensors: Any) -> torch.Tensor:
        seen.append(tensors["input"].clone())
        assert tensors["input"].is_contiguous()
        return right(**tensors)

    operator = CATALOGUE["npu_swiglu"]
    assert find_problems(operator, sample(), "float32", implementation=spy) == []
    assert find_problems(operator, sample(), "float32", seed=0, implementation=spy) == []
    arguments = operator.arguments(sample(), "float32")
    assert (
        run_and_compare(operator, arguments, operator.golden(arguments, "float32"), "float32", implementation=spy) == []
    )
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(("name", "outputs", "tensors"), [("npu_add_rms_norm", 3, 3), ("npu_grouped_matmul", 1, 3)])
def test_every_output_and_every_argument_of_an_operator_is_looked_at(name: str, outputs: int, tensors: int) -> None:
    """Three tensors and a number in, three tensors out; tensors in lists, and others."""
    parameters = CATALOGUE[name].samples[0].parameters
    operator = operator_of(name)
    check(name, parameters)

    def all_wrong(**given: Any) -> Any:
        found = [output.double() + 1 for output in operator(**given)]
        for value in by_name(given).values():
            value.add_(1)
        return found

    problems = find_problems(CATALOGUE[name], parameters, "float32", implementation=all_wrong)
    arguments = CATALOGUE[name].arguments(parameters, "float32")
    written = list(by_name(to_tensors(arguments, "float32")))
    made = [each.name for each in CATALOGUE[name].golden(arguments, "float32")]
    assert (len(made), len(written)) == (outputs, tensors)
    assert [problem.split(":")[0] for problem in problems] == [
        *(f"output {name!r}" for name in 2 * made), *(f"argument {name!r} was overwritten" for name in written),
    ]  # fmt: skip
    with pytest.raises(AssertionError) as raised:
        check(name, parameters, implementation=all_wrong)
    assert all(f"\n  {problem}" in str(raised.value) for problem in problems)


def test_an_empty_argument_shares_no_memory() -> None:
    whole = torch.zeros(2)
    tensors = {"a": whole, "empty": whole[:0]}
    before = {name: value.clone() for name, value in tensors.items()}
    assert tensors["empty"].data_ptr() in (0, whole.data_ptr())
    assert side_effects(record("a"), before, tensors, (whole,)) == []


@pytest.mark.parametrize("name", ["npu_add_rms_norm", "npu_prompt_flash_attention"])
def test_numbers_and_texts_are_passed_as_they_are(name: str) -> None:
    samples = CATALOGUE[name].samples
    plain = [each for each in samples if any(type(v) in (int, float, str) for v in CATALOGUE[name].build(
        np.random.default_rng(0), **each.parameters).values())]  # fmt: skip
    assert plain
    check(name, plain[0].parameters)


def test_every_tensor_of_a_list_is_taken_and_named() -> None:
    values = [np.full(2, number, np.float32) for number in range(3)]
    tensors = to_tensors({"x": values, "bias": None, "y": values[0]}, "float32", "cpu")
    assert [tensor.tolist() for tensor in tensors["x"]] == [value.tolist() for value in values]
    found = by_name(tensors)
    assert found.keys() == {"x[0]", "x[1]", "x[2]", "y"}
    assert all(found[f"x[{number}]"] is tensors["x"][number] for number in range(3))
    assert by_name({"x": tensors["x"], "group_list": [found["y"]]}).keys() == {"x[0]", "x[1]", "x[2]", "group_list[0]"}


def test_what_is_written_is_given_where_nothing_is_returned() -> None:
    tensors = {"key": torch.ones(1), "value": torch.ones(2), "slots": torch.ones(3)}
    found = call(lambda **given: None, tensors, ("value", "key"))
    assert [each is tensors[name] for each, name in zip(found, ("value", "key"), strict=True)] == [True, True]
