"""What locating an error asks of a mixture of experts, and by how much a few values may err: written by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.accuracy import locate_error
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.intermediates import Point
from qwen2_npu.conformance.accuracy.locate_error import Divergence
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR, ErrorRatio
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace

BATCH = Batch.of([[1, 2], [3]])
TRACE = Trace(np.zeros((2, 2, 4)), np.zeros((2, 1, 4)), np.zeros((2, 1), int), np.ones((2, 2), bool))


def test_the_points_of_experts_and_what_computes_them() -> None:
    linear = ("router", "shared gate", "shared gate_proj", "shared up_proj", "shared down_proj")
    of_experts = dict.fromkeys(linear, "linear") | {
        "routing weights": "softmax, topk", "shared mlp activation": "silu, mul",
        "expert products": "matmul, silu, mul, matmul", "combination": "mul, add",
    }  # fmt: skip
    assert of_experts.items() < locate_error.SMALL_OPERATORS.items()
    assert locate_error.FEW_ERRORS == {
        "router": None, "routing weights": None, "shared gate": None, "expert products": 4, "combination": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "count"),
    [
        ("router", np.ones((1, 3)), 3),
        ("routing weights", np.array([[0.5, 0.0, 0.5, 0.0]]), 2),  # those that were not chosen are 0
        ("shared gate", np.zeros((2, 1)), 1),
        ("expert products", np.ones((2, 50)), 8),
        ("combination", np.ones((2, 50)), 6),
    ],
)
def test_few_values_may_err_by_chance_up_to_a_limit_of_their_number(name: str, values: Any, count: int) -> None:
    limit = RMS_FACTOR * 10 ** (6 / count)
    for ratio, chance in ((limit, True), (float(np.nextafter(limit, np.inf)), False), (float("nan"), False)):
        assert locate_error._by_chance(ErrorRatio(ratio, 1.0, 0.0), Point(0, name, values)) is chance


def test_other_points_err_by_no_chance() -> None:
    for name in ("q_proj", "shared down_proj", "lm_head"):
        assert not locate_error._by_chance(ErrorRatio(RMS_FACTOR, 1.0, 0.0), Point(0, name, np.ones((1, 1))))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_experts_are_forced_in_eager_passes_alone(compiled: bool, last: bool) -> None:
    """Graphs are asked a second time, with nothing forced, for their logits."""
    asked: list[dict[str, Any]] = []
    chosen, hidden = np.zeros((1, 2, 3, 2), int), np.ones((2, 2, 3))
    routing: Any = {"prefill": object()}
    forced = replace(TRACE, hidden=hidden, routing=routing, chosen=chosen)
    free = replace(TRACE, prefill_logits=TRACE.prefill_logits + 1)

    def ask(function: Any, model: Any, **arguments: Any) -> Trace:
        assert function is locate_error.teacher_forcing.run
        asked.append(arguments)
        return forced if "chosen" in arguments else free

    model = SimpleNamespace(
        optimizations=SimpleNamespace(last_token_logits=last), compiled_steps={"decode": 1} if compiled else {}
    )
    baseline = replace(TRACE, hidden=hidden, chosen=chosen)
    found = locate_error.trace_model(model, BATCH, baseline, ask)
    common = {"batch": BATCH, "decode_steps": 1, "forced": baseline.forced, "last_token": last}
    assert asked[0] == common | {"hidden": True, "chosen": chosen, "uncompiled": True}
    if not compiled:
        assert found is forced
        assert len(asked) == 1
        return
    assert asked[1:] == [common | {"hidden": False}]
    assert found.prefill_logits is free.prefill_logits
    assert (found.hidden is hidden, found.routing is routing, found.chosen is chosen, found.compiled) == (True,) * 4


def test_of_a_dense_model_nothing_is_forced() -> None:
    asked: list[dict[str, Any]] = []

    def ask(function: Any, model: Any, **arguments: Any) -> Trace:
        asked.append(arguments)
        return TRACE

    model = SimpleNamespace(optimizations=SimpleNamespace(last_token_logits=True), compiled_steps={"decode": 1})
    assert locate_error.trace_model(model, BATCH, TRACE, ask) is TRACE
    assert [call.keys() for call in asked] == [{"batch", "decode_steps", "forced", "hidden", "last_token"}]
    assert asked[0]["hidden"] is False


def test_a_near_tie_of_experts_excuses_a_text_whatever_its_margin() -> None:
    parted = Divergence(0, 1, 2, 3, baseline_logits=(9.0, 0.0), noise=0.1)
    assert not parted.excused
    assert replace(parted, routing="a near-tie").excused
    assert replace(parted, noise=4.5).excused


@pytest.mark.parametrize(("name", "found"), [("shared gate", False), ("q_proj", True)])
def test_an_error_that_may_be_chance_is_no_place(name: str, found: bool) -> None:
    """One value, twice as far off as the baseline's: of q_proj, where there are always many, it is too much."""
    noise = 2.0**-4
    ours, stock, true = (Point(3, name, np.full((1, 1), 1 + off)) for off in (2 * noise, noise, 0.0))
    recorders: Any = [SimpleNamespace(by_place=lambda point=point: {(3, name): point}) for point in (stock, true)]
    location = locate_error.first_beyond([ours], *recorders, torch.float32, 0)
    assert (location is not None) is found


@pytest.mark.parametrize("chosen", [None, np.zeros((1, 2, 3, 2), int)])
def test_all_three_are_looked_into_with_the_same_experts(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(locate_error, "exact", lambda model: nullcontext())
    monkeypatch.setattr(locate_error, "captures", lambda model, batch, forced, given: asked.append(given) or [])

    def ask(function: Any, model: Any, **arguments: Any) -> list[Any]:
        asked.append(arguments.get("chosen"))
        return []

    assert locate_error.locate(1, 2, 3, BATCH, TRACE.forced, torch.float32, ask, chosen) is None
    assert [given is chosen for given in asked] == [True] * 3
