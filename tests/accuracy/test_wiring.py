"""The suites ask what their tables say; a case that is asked of another model, or not at all, would fail nothing."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen2_npu import Optimizations
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES
from qwen2_npu.conformance.accuracy.configs import SHAPES
from qwen2_npu.conformance.operators import CATALOGUE
from qwen2_npu.optimizations import QUANTIZED
from tests.accuracy import axes, pairs, quantised, test_axes, test_ladder, test_operators, test_quantised
from tests.accuracy.pairs import CHECKPOINT, MIXTURE, TINY
from tests.graph import test_census, test_equality, test_modes

DTYPES = ("float32", "bfloat16", "float16")
OPTIONS: dict[str, Any] = {
    "model_path": None, "assume_tp": None, "dtype": None, "steps": None, "device": "cpu", "stream": None,
    "decode_steps": 5,
}  # fmt: skip


def config_of(**options: Any) -> Any:
    return SimpleNamespace(option=SimpleNamespace(**OPTIONS | options))


def cases_of(suite: Any, *names: str, **options: Any) -> list[Any]:
    found: list[Any] = []
    metafunc: Any = SimpleNamespace(
        config=config_of(**options), fixturenames=names, parametrize=lambda names, params: found.extend(params)
    )
    suite.pytest_generate_tests(metafunc)
    return found


def of_the_fast_lane(params: list[Any]) -> list[tuple[Any, ...]]:
    return [param.values for param in params if not param.marks]


@pytest.mark.parametrize(
    "presets",
    [
        test_ladder.PRESETS | test_ladder.EXPERT_PRESETS, axes.PRESETS, *axes.QUANTISED_PRESETS.values(),
        *quantised.PRESETS.values(),
    ],
)  # fmt: skip
def test_every_preset_switches_on_what_no_other_does(presets: dict[str, Optimizations]) -> None:
    seen: dict[Optimizations, str] = {}
    for name, optimizations in presets.items():
        assert seen.setdefault(optimizations, name) == name


def test_two_batches_of_the_axes_have_columns_of_padding_alone() -> None:
    masks = {name: axes.batch_of(name).attention_mask for name in axes.BATCHES}
    assert [name for name, mask in masks.items() if not mask[:, 0].any()] == ["equally_padded", "alike_and_unsorted"]
    assert masks["equally_padded"][:, 3:].all()
    assert not masks["alike_and_unsorted"][:, 1:].all()


@pytest.mark.parametrize("failure", ["", "what is wrong"])
def test_a_case_of_the_axes_is_asked_of_its_own_model_batch_and_way(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    comparison = SimpleNamespace(failures=lambda: [failure] * bool(failure))
    monkeypatch.setattr(test_axes, "built", lambda *how: asked.append(how) or "ours")
    monkeypatch.setattr(test_axes, "compare", lambda *how: asked.append(how) or comparison)
    for test in (test_axes.test_agrees_at_every_position, test_axes.test_8_bit_weights_agree_at_every_position):
        with pytest.raises(AssertionError) if failure else nullcontext():
            test("preset", "model", "dtype", "batch", "way", "device")
    assert asked == 2 * [("model", "dtype", "preset", "device"), ("ours", "model", "dtype", "batch", "way")]


# ---- what is in the fast lane ---------------------------------------------------------------------------------------
def test_the_ladder_runs_every_preset_dtype_batch_and_weights_in_the_fast_lane() -> None:
    fast = of_the_fast_lane(cases_of(test_ladder, "preset", "dtype", "shape", "weights"))
    presets, dtypes, shapes, weights = map(set, zip(*fast, strict=True))
    if MIXTURE in SHAPES:
        assert presets == set(test_ladder.PRESETS | test_ladder.EXPERT_PRESETS)
    assert (dtypes, shapes, weights) == (set(DTYPES), set(BATCH_SHAPES), {TINY, *SHAPES})
    assert {(w, d) for _, d, _, w in fast} == {(w, d) for d in DTYPES for w in (TINY, *SHAPES)}


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_8_bit_weights_run_every_preset_dtype_batch_and_weights_in_the_fast_lane(scheme: str) -> None:
    params = cases_of(test_quantised, "scheme", "preset")
    fast = [rest for first, *rest in of_the_fast_lane(params) if first == scheme]
    dtypes = DTYPES if scheme == "w8a16" else DTYPES[1:]
    every = quantised.PRESETS[scheme], dtypes, BATCH_SHAPES, test_quantised.WEIGHTS
    assert [set(values) for values in zip(*fast, strict=True)] == [set(values) for values in every]
    assert {weights for *_, weights in (param.values for param in params)} == {TINY, *SHAPES} - {MIXTURE}


def test_every_sample_of_every_operator_is_run_in_every_dtype_and_every_refusal_once() -> None:
    samples = {tuple(given if isinstance(given, str) else given.name for given in param.values)
               for param in test_operators.SAMPLES}  # fmt: skip
    assert samples == {(r.name, s.name, dtype) for r in CATALOGUE.values() for s in r.samples for dtype in DTYPES}
    refused = {tuple(given.name for given in param.values) for param in test_operators.INVALID}
    assert refused == {(record.name, invalid.name) for record in CATALOGUE.values() for invalid in record.invalid}
    assert {param.values[0].name for param in test_operators.RECORDS} == set(CATALOGUE)


@pytest.mark.parametrize("suite", [test_census, test_equality, test_modes], ids=lambda suite: suite.__name__)
def test_what_is_named_for_the_fast_lane_is_there(suite: Any) -> None:
    """A name that no case has any more would leave the lane without one."""
    params = suite.GRAPHS if suite is test_census else suite.CASES
    fast = {str(values[0]) if suite is test_census else values for values in of_the_fast_lane(params)}
    assert fast == suite.FAST


# ---- what each case is asked ----------------------------------------------------------------------------------------
class Asked:
    """In place of ``pair_of``: takes down how the pair was made and what it was asked."""

    def __init__(self, answer: str) -> None:
        self.calls: list[Any] = []
        self.answer = answer

    def __call__(self, config: Any, *made: str) -> Any:
        self.calls.append(made)
        return SimpleNamespace(failure=self.failure)

    def failure(self, *question: Any) -> str:
        self.calls.append(question)
        return self.answer


@pytest.mark.parametrize("answer", ["", "step none, …"])
@pytest.mark.parametrize("suite", [test_ladder, test_quantised])
def test_a_case_is_asked_of_its_own_weights_dtype_step_and_batch(
    suite: Any, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(answer)
    monkeypatch.setattr(suite, "pair_of", asked)
    scheme, presets = ("w8a16",), quantised.PRESETS["w8a16"]
    if suite is test_ladder:
        scheme, presets = (), test_ladder.PRESETS  # type: ignore[assignment]
    name = list(presets)[1]
    with pytest.raises(AssertionError) if answer else nullcontext():
        suite.test_agrees_at_every_position(*scheme, name, "float16", "four", TINY, config_of())
    assert asked.calls == [(TINY, *scheme, "float16"), (presets[name], "four")]


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
    assert len({question[4] for question, _ in asked}) > 1
    assert len({str(question[1]) for question, _ in asked}) > 10


@pytest.mark.parametrize("weights", [TINY, "qwen2-0.5b", CHECKPOINT])
def test_a_pair_is_made_of_every_option(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(pairs, "pair_of_checkpoint", lambda path, **how: made.append((path, how)))
    monkeypatch.setattr(pairs.ModelPair, "of_shape", lambda shape, **how: made.append((shape, how)))
    options = {"device": "cuda:7", "decode_steps": 3, "assume_tp": 2}
    for dtype in DTYPES:
        pairs.pair_of(config_of(**options, model_path="folder" if weights == CHECKPOINT else None), weights, dtype)
    if weights in SHAPES:
        del options["assume_tp"]
        assert made == [(weights, options | {"dtype": getattr(torch, dtype)}) for dtype in DTYPES]
    else:
        path = "folder" if weights == CHECKPOINT else None
        assert made == [(path, options | {"dtype": dtype, "stream": None}) for dtype in DTYPES]
