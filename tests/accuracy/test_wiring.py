"""The suites ask what their tables say; a case that is asked of another model, or not at all, would fail nothing."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen2_npu import Optimizations
from qwen2_npu.compat import IS_V4
from qwen2_npu.conformance.accuracy import text
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES
from qwen2_npu.conformance.accuracy.configs import SHAPES
from qwen2_npu.conformance.operators import CATALOGUE
from qwen2_npu.optimizations import QUANTIZED
from tests.accuracy import (
    axes,
    pairs,
    quantised,
    stock_scenarios,
    test_axes,
    test_ladder,
    test_operators,
    test_quantised,
)
from tests.accuracy import test_tensor_parallel as parallel
from tests.accuracy.pairs import CHECKPOINT, TINY
from tests.graph import support, test_census, test_equality, test_modes

DTYPES = ("float32", "bfloat16", "float16")
OPTIONS = {"model_path": None, "assume_tp": 2, "dtype": None, "steps": None, "device": "cuda:7", "stream": None}
LADDERS = (test_ladder.PRESETS | test_ladder.EXPERT_PRESETS, *quantised.PRESETS.values())


def config_of(**options: Any) -> Any:
    return SimpleNamespace(option=SimpleNamespace(**OPTIONS | {"decode_steps": 3} | options))


def of_the_fast_lane(params: list[Any]) -> list[tuple[Any, ...]]:
    return [param.values for param in params if not param.marks]


def cases_of_the_fast_lane(suite: Any, *names: str) -> list[tuple[Any, ...]]:
    found: list[Any] = []
    metafunc: Any = SimpleNamespace(
        config=config_of(), fixturenames=names, parametrize=lambda names, params: found.extend(params)
    )
    suite.pytest_generate_tests(metafunc)
    return of_the_fast_lane(found)


# ---- which cases there are ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("presets", [*LADDERS, axes.PRESETS, *axes.QUANTISED_PRESETS.values()])
def test_every_preset_switches_on_what_no_other_does(presets: dict[str, Optimizations]) -> None:
    seen: dict[Optimizations, str] = {}
    for name, optimizations in presets.items():
        assert seen.setdefault(optimizations, name) == name


def test_two_batches_of_the_axes_have_columns_of_padding_alone() -> None:
    masks = {name: axes.batch_of(name).attention_mask for name in axes.BATCHES}
    assert [name for name, mask in masks.items() if not mask[:, 0].any()] == ["equally_padded", "alike_and_unsorted"]
    assert masks["equally_padded"][:, 3:].all()
    assert not masks["alike_and_unsorted"][:, 1:].all()


def test_prompts_that_are_called_padded_are() -> None:
    cpu = SimpleNamespace(device="cpu")
    left, right = (stock_scenarios.prompt(cpu, left=left)["attention_mask"] for left in (True, False))
    assert left.sum(1).tolist() == right.sum(1).tolist() == [11, 7, 4]
    assert left[:, 7:].all()
    assert right[:, :4].all()
    even, ragged = (support.prompt("cpu", 2, 9, ragged=ragged)["attention_mask"] for ragged in (False, True))
    assert (even.sum(1).tolist(), ragged.sum(1).tolist()) == ([9, 9], [9, 5])
    assert ragged[:, 4:].all()


def test_the_ladder_runs_all_there_is_in_the_fast_lane() -> None:
    fast = cases_of_the_fast_lane(test_ladder, "preset", "dtype", "shape", "weights")
    dense, (presets, _, shapes, _) = test_ladder.PRESETS, map(set, zip(*fast, strict=True))
    # 4.37.0 has no mixture, and runs no single steps: see test_ladder.cases.
    assert presets == {name for name in LADDERS[0] if not IS_V4 or (name in dense and not name.startswith("only_"))}
    assert shapes == set(BATCH_SHAPES)
    assert {(weights, dtype) for _, dtype, _, weights in fast} == {(w, d) for d in DTYPES for w in (TINY, *SHAPES)}


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_8_bit_weights_run_all_there_is_in_the_fast_lane(scheme: str) -> None:
    fast = [rest for first, *rest in cases_of_the_fast_lane(test_quantised, "scheme", "preset") if first == scheme]
    dtypes = DTYPES if scheme == "w8a16" else DTYPES[1:]
    every = quantised.PRESETS[scheme], dtypes, BATCH_SHAPES, test_quantised.WEIGHTS
    assert [set(values) for values in zip(*fast, strict=True)] == [set(values) for values in every]


def test_every_sample_of_every_operator_is_run_in_every_dtype_and_every_refusal_once() -> None:
    samples = {(record.name, sample.name, dtype) for record, sample, dtype in of_the_fast_lane(test_operators.SAMPLES)}
    assert samples == {(r.name, s.name, dtype) for r in CATALOGUE.values() for s in r.samples for dtype in DTYPES}
    refused = {(record.name, invalid.name) for record, invalid in of_the_fast_lane(test_operators.INVALID)}
    assert refused == {(record.name, invalid.name) for record in CATALOGUE.values() for invalid in record.invalid}


@pytest.mark.parametrize("suite", [test_census, test_equality, test_modes], ids=lambda suite: suite.__name__)
def test_what_is_named_for_the_fast_lane_is_there(suite: Any) -> None:
    """A name that no case has any more would leave the lane without one."""
    params = suite.GRAPHS if suite is test_census else suite.CASES
    assert {str(values[0]) if suite is test_census else values for values in of_the_fast_lane(params)} == suite.FAST


# ---- what each case is asked ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("failure", ["", "step none, …"])
def test_a_case_is_asked_of_its_own_model_dtype_step_batch_and_way(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    pair = SimpleNamespace(failure=lambda *question: asked.append(question) or failure)
    for suite, scheme in ((test_ladder, ()), (test_quantised, ("w8a16",))):
        monkeypatch.setattr(suite, "pair_of", lambda config, *made: asked.append(made) or pair)
        presets: Any = quantised.PRESETS[scheme[0]] if scheme else test_ladder.PRESETS
        name = list(presets)[1]
        with pytest.raises(AssertionError) if failure else nullcontext():
            suite.test_agrees_at_every_position(*scheme, name, "float16", "four", TINY, config_of())
        assert asked == [(TINY, *scheme, "float16"), (presets[name], "four")]
        asked.clear()
    comparison = SimpleNamespace(failures=lambda: [failure] * bool(failure))
    monkeypatch.setattr(test_axes, "built", lambda *how: asked.append(how) or "ours")
    monkeypatch.setattr(test_axes, "compare", lambda *how: asked.append(how) or comparison)
    for test in (test_axes.test_agrees_at_every_position, test_axes.test_8_bit_weights_agree_at_every_position):
        with pytest.raises(AssertionError) if failure else nullcontext():
            test("preset", "model", "dtype", "batch", "way", "device")
    assert asked == 2 * [("model", "dtype", "preset", "device"), ("ours", "model", "dtype", "batch", "way")]


def test_an_operator_is_checked_on_its_sample_in_its_dtype_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(test_operators, "check", lambda *question, **how: asked.append((question, how)))
    record = CATALOGUE["npu_rms_norm"]
    first, *_, last = record.samples
    test_operators.test_matches_golden(record, last, "float16", "emulated")
    test_operators.test_accepts_or_refuses_strided_tensors(record, "cuda:1")
    assert asked == [
        ((record.name, last.parameters, "float16", "npu", last.seed), {}),
        ((record.name, first.parameters, "float32", "cuda:1", first.seed), {"strided": True}),
    ]
    asked.clear()
    test_operators.test_matches_golden_on_generated_samples(record, "cpu")
    assert {question[2] for question, _ in asked} == set(DTYPES)
    assert len({(str(question[1]), question[4]) for question, _ in asked}) > 10


@pytest.mark.parametrize(("weights", "path"), [(TINY, None), ("qwen2-0.5b", None), (CHECKPOINT, "folder")])
def test_a_pair_is_made_of_every_option(weights: str, path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(pairs, "pair_of_checkpoint", lambda path, **how: made.append((path, how)))
    monkeypatch.setattr(pairs.ModelPair, "of_shape", lambda shape, **how: made.append((shape, how)))
    monkeypatch.setattr(pairs, "_pair", pairs._pair.__wrapped__)  # the cache is for pairs
    common = {"device": "cuda:7", "decode_steps": 3}
    for dtype in DTYPES:
        pairs.pair_of(config_of(model_path=path), weights, dtype)
        how: dict[str, Any] = {"dtype": dtype, "stream": None, "assume_tp": 2}
        how = {"dtype": getattr(torch, dtype)} if weights in SHAPES else how
        assert made.pop() == (weights if weights in SHAPES else path, common | how)


@pytest.mark.parametrize("excused", [True, False])
def test_the_text_of_ranks_is_compared_with_that_of_one(excused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    divergence = SimpleNamespace(excused=excused, describe=lambda text: "")
    monkeypatch.setattr(text, "greedy", lambda model, *given, **how: [[model]])
    monkeypatch.setattr(text, "compare_texts", lambda *given: asked.append(given) or ([divergence], None))
    models = {"build": lambda switches: 1, "baseline": "stock", "reference": "exact"}
    pair = SimpleNamespace(tokenizer=None, batch=lambda shape: shape, **models)
    subject: Any = SimpleNamespace(pair=pair, build=lambda rank, switches: rank)
    with nullcontext() if excused else pytest.raises(AssertionError):
        parallel.check_greedy(subject, lambda build: [build(2), build(2)], Optimizations.all())
    assert asked == [([[2]], [[1]], "ragged", "stock", "exact")]
    with pytest.raises(AssertionError):  # the last rank has a text of its own
        parallel.check_greedy(subject, lambda build: [build(2), build(2), build(3)], Optimizations.all())
