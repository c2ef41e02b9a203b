"""The rule for experts: what is excused, and what is not, at its bounds."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.accuracy.compare import Comparison, compare_traces
from qwen2_npu.conformance.accuracy.compare_routing import compare_routing, same_so_far
from qwen2_npu.conformance.accuracy.routing import UNKNOWN, Choices
from qwen2_npu.conformance.accuracy.teacher_forcing import Array, Trace

LAYERS, ROWS, WIDTH, STEPS, EXPERTS, TOP = (1, 3), 2, 3, 2, 5, 2
VALID = np.array([[False, True, True], [True, True, True]])
NOISE = 0.25  # what follows is exact in binary
LOGITS = [4.0, 3.0, 2.0, 1.0, 0.0]


def choices(columns: int, logits: list[float] = LOGITS, shift: float = 0.0) -> Choices:
    said = np.broadcast_to(np.array(logits), (len(LAYERS), ROWS, columns, EXPERTS)) + shift
    wanted = np.broadcast_to(np.array([0, 1]), (len(LAYERS), ROWS, columns, TOP)).copy()
    return Choices(LAYERS, said.copy(), wanted)


def routing(shift: float = 0.0, logits: list[float] = LOGITS) -> dict[str, Choices]:
    return {"prefill": choices(WIDTH, logits, shift), "decode": choices(STEPS, logits, shift)}


def choosing(experts: list[int], path: str = "prefill", layer: int = 1, row: int = 1, column: int = 2) -> dict:
    ours = routing(NOISE)
    ours[path].wanted[layer, row, column] = experts
    return ours


def test_neighbours_of_the_dtype_are_a_near_tie_however_exact_the_baseline_is() -> None:
    for margin, excused in ((2.0**-4, True), (2.0**-4 + 2.0**-40, False)):
        exact = routing(0.0, [9.0, 8.3125, 8.3125 - margin, 0.0, 0.0])
        found = compare_routing(choosing([0, 2]), exact, exact, VALID, torch.bfloat16)
        (mismatch,) = found.excused if excused else found.unexcused
        assert (mismatch.margin, mismatch.noise) == (margin, 2.0**-5)


def test_the_same_experts_agree_in_any_order_and_padding_does_not_count() -> None:
    ours = choosing([1, 0])
    ours["prefill"].wanted[:, ~VALID] = 4
    found = compare_routing(ours, routing(NOISE), routing(), VALID, torch.float64)
    assert found.passed
    assert found.choices == found.agreements == len(LAYERS) * (VALID.sum() + ROWS * STEPS)
    assert found.mismatches == ()


def test_tokens_that_a_layer_leaves_out_do_not_count_and_the_others_do() -> None:
    """The last layer of a prefill may compute the last column alone."""
    for experts, passed in (([1, 0], True), ([0, 4], False)):
        ours = choosing(experts)
        ours["prefill"].wanted[1, :, :-1] = UNKNOWN
        ours["prefill"].logits[1, :, :-1] = np.nan
        found = compare_routing(ours, routing(NOISE), routing(), VALID, torch.float64)
        assert found.passed is passed
        assert found.choices == VALID.sum() + ROWS + len(LAYERS) * ROWS * STEPS
        assert found.agreements == found.choices - (not passed)
        assert found.max_error == 0.0


@pytest.mark.parametrize(
    ("margin", "excused"), [(2 * NOISE, True), (np.nextafter(2 * NOISE, 1), False)], ids=["largest", "beyond"]
)
def test_the_largest_margin_that_is_excused_is_twice_the_noise(margin: float, excused: bool) -> None:
    logits = [4.0, margin, 0.0, -1.0, -2.0]
    exact = routing(0.0, logits)
    stock = routing(0.0, logits)
    stock["prefill"].logits[..., 4] += NOISE  # the margin itself is the baseline's, to the last bit
    found = compare_routing(choosing([0, 2]), stock, exact, VALID, torch.float64)
    (mismatch,) = found.excused if excused else found.unexcused
    assert found.passed is excused
    assert (mismatch.path, mismatch.layer, mismatch.row, mismatch.position) == ("prefill", 3, 1, 2)
    assert (mismatch.baseline_experts, mismatch.optimised_experts) == ((1,), (2,))
    assert (mismatch.margin, mismatch.noise) == (margin, NOISE)
    assert bool(found.failures()) is not excused


def test_noise_is_of_the_same_layer_and_position_alone() -> None:
    """As large noise anywhere else excuses nothing."""
    logits = [4.0, 0.5, 0.0, -1.0, -2.0]
    stock = routing(NOISE, logits)
    for part in stock.values():
        part.logits[...] += 100
    stock["prefill"].logits[1, 1, 2] = logits
    assert not compare_routing(choosing([0, 2]), stock, routing(0.0, logits), VALID, torch.float64).passed


def test_several_experts_are_judged_by_the_pair_that_is_furthest_apart() -> None:
    """0 and 1 for 2 and 3: 1 and 2 are near, 0 and 3 are not."""
    logits = [2.0, 0.1, 0.0, -2.0, -3.0]
    found = compare_routing(choosing([2, 3]), routing(NOISE, logits), routing(0.0, logits), VALID, torch.float64)
    assert found.unexcused[0].margin == 4.0


def test_every_mismatch_of_a_layer_counts_and_is_written() -> None:
    """Three positions of one layer: near, far and near; the far one alone is a failure."""
    logits = [4.0, 0.5, 0.0, -1.0, -2.0]
    stock = routing(0.0, logits)
    stock["prefill"].logits[..., 4] += NOISE
    ours = routing(0.0, logits)
    for column, experts in enumerate(([0, 2], [0, 3], [0, 2])):
        ours["prefill"].wanted[1, 1, column] = experts
    found = compare_routing(ours, stock, routing(0.0, logits), VALID, torch.float64)
    assert [mismatch.position for mismatch in found.mismatches] == [0, 1, 2]
    assert [mismatch.position for mismatch in found.excused] == [0, 2]
    assert [mismatch.position for mismatch in found.unexcused] == [1]
    assert not found.passed
    assert [each["position"] for each in found.to_dict()["excused"]] == [0, 2]
    ours["prefill"].wanted[1, 1, 2] = [0, 4]
    found = compare_routing(ours, stock, routing(0.0, logits), VALID, torch.float64, {"decode": 3})
    assert len(found.failures()) == 2
    written = found.to_dict()
    assert (written["choices"], written["agreements"]) == (found.choices, found.choices - 3)
    assert [each["position"] for each in written["excused"]] == [0]
    assert [each["optimised_experts"] for each in written["unexcused"]] == [(3,), (4,)]
    assert (written["max_error"], written["left_out"], written["passed"]) == (NOISE, {"decode": 3}, False)


def test_one_choice_is_enough_and_none_is_not() -> None:
    ours = {"prefill": choices(WIDTH)}
    ours["prefill"].wanted[0] = UNKNOWN
    for column, passed in ((2, True), (None, False)):
        ours["prefill"].wanted[1] = UNKNOWN
        if column is not None:
            ours["prefill"].wanted[1, 1, column] = [0, 1]
        found = compare_routing(ours, routing(NOISE), routing(), VALID, torch.float64)
        assert (found.choices, found.passed) == (int(passed), passed)


def test_a_baseline_that_chooses_one_expert_twice_excuses_nothing() -> None:
    stock = routing(NOISE)
    stock["prefill"].wanted[1, 1, 2] = [0, 0]
    (mismatch,) = compare_routing(routing(), stock, routing(), VALID, torch.float64).unexcused
    assert (mismatch.baseline_experts, mismatch.optimised_experts, mismatch.margin) == ((), (1,), float("inf"))


def test_a_prompt_alone_is_the_same_so_far() -> None:
    ours, stock = {"prefill": choices(WIDTH)}, {"prefill": choices(WIDTH)}
    ours["prefill"].wanted[1, 1, 1] = [0, 2]
    assert same_so_far(ours, stock, VALID).tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize(
    "experts",
    [[0, 0], [0, 5], [0, -1], [2, 2], [2, 5], [-1, 2]],
    ids=["twice", "beyond the last", "before the first", "another twice", "another and none", "none and another"],
)
def test_what_is_no_choice_is_never_excused(experts: list[int]) -> None:
    stock = routing(100.0)
    found = compare_routing(choosing(experts), stock, routing(), VALID, torch.float64)
    assert len(found.unexcused) == 1
    json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("path", "row", "column", "position"),
    [("prefill", 0, 1, 0), ("hidden", 0, 2, 1), ("last_token", 1, 0, 0), ("decode", 0, 1, 3), ("decode", 1, 0, 3)],
)
def test_a_failure_names_path_layer_row_position_experts_margin_and_noise(
    path: str, row: int, column: int, position: int
) -> None:
    ours = routing(NOISE)
    ours |= {"hidden": choices(WIDTH), "last_token": choices(WIDTH)}
    ours[path].wanted[0, row, column] = [0, 4]
    found = compare_routing(ours, routing(NOISE), routing(), VALID, torch.float64)
    assert found.failures() == [
        f"routing in {path}, layer 1 row {row} position {position}: baseline chooses expert 1, optimised 4; margin 3 "
        "beyond 2 × noise 0.25"
    ]
    assert found.to_dict()["agreements"] == found.choices - 1


def test_where_nothing_is_compared_nothing_passes() -> None:
    found = compare_routing({}, routing(), routing(), VALID, torch.float64)
    assert (found.choices, found.passed) == (0, False)
    assert found.failures() == ["no routing was compared"]


@pytest.mark.parametrize(("path", "layer"), [("prefill", 0), ("prefill", 1), ("decode", 0)])
def test_the_largest_error_may_be_in_any_layer_and_is_not_that_of_padding(path: str, layer: int) -> None:
    ours = routing()
    ours[path].logits[layer, 0, 1, 2] += 3
    ours["prefill"].logits[:, ~VALID] += 100
    assert compare_routing(ours, routing(), routing(), VALID, torch.float64).max_error == 3


def test_nan_in_the_router_is_not_excused() -> None:
    ours, stock = choosing([0, 2]), routing(NOISE)
    stock["prefill"].logits[1, 1, 2, 2] = np.nan
    assert not compare_routing(ours, stock, routing(), VALID, torch.float64).passed


def test_only_what_follows_a_choice_of_its_own_in_the_same_row_is_left_out() -> None:
    same = same_so_far(choosing([0, 2], row=1, column=1), routing(), VALID)
    assert same.tolist() == [[False, True, True, True, True], [True, False, False, False, False]]
    at_padding = choosing([0, 2], row=0, column=0)
    assert same_so_far(at_padding, routing(), VALID).tolist() == [[False, True, True, True, True], [True] * 5]
    same = same_so_far(choosing([0, 2], path="decode", row=0, column=1), routing(), VALID)
    assert same.tolist() == [[False, True, True, True, False], [True] * 5]


# ---- within a comparison --------------------------------------------------------------------------------------------
def trace(error: float = 0.0, **fields: object) -> Trace:
    def logits(*shape: int) -> Array:
        exact = np.random.default_rng(7).standard_normal((*shape, 6))
        return exact + error * np.random.default_rng(int(error * 1e9)).standard_normal(exact.shape)

    parts = {"prefill_logits": logits(ROWS, WIDTH), "decode_logits": logits(ROWS, STEPS)}
    found = Trace(**parts, forced=np.zeros((ROWS, STEPS), np.int64), valid=VALID, routing=routing())
    return replace(found, **fields)


def test_a_comparison_fails_by_its_routing_and_says_so() -> None:
    ours = trace(1e-5, routing=choosing([0, 4]))
    result = compare_traces(ours, trace(2e-5, routing=routing(NOISE)), trace(), torch.float32)
    assert not result.passed
    assert [line.split(",")[0] for line in result.failures()] == ["routing in prefill"]
    assert result.to_dict()["routing"]["passed"] is False


def test_a_dense_model_has_no_word_of_experts() -> None:
    traces = [trace(error, routing={}) for error in (1e-5, 2e-5, 0)]
    assert "routing" not in compare_traces(*traces, torch.float32).to_dict()


def test_of_compiled_steps_only_the_positions_before_another_choice_are_compared() -> None:
    """What comes after it is wrong in all logits here, and counted."""
    logits = [4.0, 0.5, 0.25, -1.0, -2.0]
    ours = trace(1e-5, routing=choosing([0, 2], row=1, column=1), compiled=True)
    ours.prefill_logits[1, 1:] += 1
    ours.decode_logits[1] += 1
    baseline, exact = trace(2e-5, routing=routing(NOISE, logits)), trace(routing=routing(0.0, logits))
    result = compare_traces(ours, baseline, exact, torch.float32)
    assert result.passed, result.failures()
    assert [(path.path, path.positions) for path in result.paths] == [("prefill", 3), ("decode", 2)]
    assert result.to_dict()["routing"]["left_out"] == {"prefill": 2, "decode": 2}
    ours.decode_logits[0, 1] += 1
    assert not compare_traces(ours, baseline, exact, torch.float32).passed
    assert not compare_traces(replace(ours, compiled=False), baseline, exact, torch.float32).passed


def test_of_compiled_steps_that_leave_nothing_to_compare_the_comparison_fails() -> None:
    logits = [4.0, 0.5, 0.25, -1.0, -2.0]
    ours = trace(1e-5, routing=routing(NOISE), compiled=True)
    ours.routing["prefill"].wanted[0, 0, 1] = ours.routing["prefill"].wanted[0, 1, 0] = [0, 2]
    baseline, exact = trace(2e-5, routing=routing(NOISE, logits)), trace(routing=routing(0.0, logits))
    result = compare_traces(ours, baseline, exact, torch.float32)
    assert result.routing is not None
    assert result.routing.passed
    assert not result.passed
    assert result.failures() == [
        "no position was compared: the compiled model may choose other experts at every one of them"
    ]


def test_of_compiled_steps_a_choice_in_decode_leaves_out_what_follows_it_alone() -> None:
    logits = [4.0, 0.5, 0.25, -1.0, -2.0]
    baseline, exact = trace(2e-5, routing=routing(NOISE, logits)), trace(routing=routing(0.0, logits))
    ours = trace(1e-5, routing=choosing([0, 2], path="decode", row=1, column=1), compiled=True)
    result = compare_traces(ours, baseline, exact, torch.float32)
    assert result.to_dict()["routing"]["left_out"] == {"prefill": 0, "decode": 1}
    assert [(path.path, path.positions) for path in result.paths] == [("prefill", 5), ("decode", 3)]


def test_without_graphs_every_position_is_compared_whatever_is_chosen() -> None:
    logits = [4.0, 0.5, 0.25, -1.0, -2.0]
    baseline, exact = trace(2e-5, routing=routing(NOISE, logits)), trace(routing=routing(0.0, logits))
    ours = trace(1e-5, routing=choosing([0, 2], row=1, column=1))
    result = compare_traces(ours, baseline, exact, torch.float32)
    assert [(path.path, path.positions) for path in result.paths] == [("prefill", 5), ("decode", 4)]
    assert result.to_dict()["routing"]["left_out"] == {}


def test_a_compiled_dense_model_has_every_position_compared() -> None:
    result = compare_traces(trace(1e-5, compiled=True), trace(2e-5), trace(), torch.float32)
    assert result.passed, result.failures()
    assert [(path.path, path.positions) for path in result.paths] == [("prefill", 5), ("decode", 4)]


def test_a_last_token_that_no_row_has_left_is_no_path() -> None:
    logits = [4.0, 0.5, 0.25, -1.0, -2.0]
    ours = trace(1e-5, routing=routing(NOISE), compiled=True)
    ours = replace(ours, last_logits=ours.prefill_logits[:, -1])
    for row in (0, 1):
        ours.routing["prefill"].wanted[0, row, 2] = [0, 2]
    baseline, exact = trace(2e-5, routing=routing(NOISE, logits)), trace(routing=routing(0.0, logits))
    result = compare_traces(ours, baseline, exact, torch.float32)
    assert "last_token" not in [path.path for path in result.paths]


def test_no_position_and_nothing_left_out_says_so_alone() -> None:
    routed = compare_routing(routing(), routing(), routing(), VALID, torch.float64)
    assert Comparison((), routed).failures() == ["no position was compared"]
