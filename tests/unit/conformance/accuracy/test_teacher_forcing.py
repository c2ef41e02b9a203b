"""What a model is asked, and where its answers are put, with a model that says what it was given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.conformance.accuracy import teacher_forcing
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.teacher_forcing import Array, Trace, position_ids_of, run, run_reference
from tests.unit.conformance.accuracy.counting_model import HIDDEN, VOCABULARY, CountingModel, answer

PROMPTS = [[5], [1, 2, 3, 8], [4, 9]]
BATCH = Batch.of(PROMPTS, pad_token_id=60)
FORCED = np.array([[10, 11, 12], [20, 21, 22], [30, 31, 32]])
STEPS = FORCED.shape[1]


def preferred(prompt: list[int], forced: list[int]) -> list[int]:
    """What the model prefers after every token."""
    tokens = [*prompt, *forced]
    return [answer(tokens[: count + 1], count) for count in range(len(tokens))]


def check_trace(trace: Trace, forced: Array) -> None:
    """Every answer is where the trace says it is."""
    assert trace.valid.tolist() == [[False] * 3 + [True], [True] * 4, [False, False, True, True]]
    assert np.array_equal(trace.forced, forced)
    assert trace.forced.dtype == np.int64
    for row, prompt in enumerate(PROMPTS):
        expected = preferred(prompt, forced[row].tolist())
        live = trace.prefill_logits[row][trace.valid[row]]
        assert live.argmax(-1).tolist() == expected[: len(prompt)]
        assert trace.decode_logits[row].argmax(-1).tolist() == expected[len(prompt) :]
        assert trace.hidden is not None
        assert np.array_equal(trace.hidden[row], trace.prefill_logits[row, :, :HIDDEN] + 5)


def test_forced_tokens_are_fed_and_every_answer_is_kept() -> None:
    model = CountingModel()
    trace = run(model, BATCH, decode_steps=STEPS, forced=FORCED, last_token=True)
    check_trace(trace, FORCED)
    assert trace.last_logits is not None
    assert np.array_equal(trace.last_logits, trace.prefill_logits[:, -1])


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
def test_what_the_model_is_asked(ours: bool) -> None:
    """Hidden states: the stock model's prefill gives them; ours has a pass without a cache for them."""
    model = CountingModel()
    if ours:
        model.optimizations = SimpleNamespace(fixed_kv_cache=False)  # type: ignore[assignment]
    run(model, BATCH, decode_steps=STEPS, forced=FORCED, last_token=True)
    prompts, decode = model.calls[: 2 + ours], model.calls[2 + ours :]
    *hidden, last, prefill = prompts
    assert [(call["use_cache"], call["output_hidden_states"], call["logits_to_keep"]) for call in hidden] == (
        [(False, True, 1)] if ours else []
    )
    assert (last["use_cache"], last["logits_to_keep"]) == (True, 1)
    assert prefill["use_cache"] is True
    recorded = set() if ours else {"output_hidden_states"}
    assert set(prefill) == {"input_ids", "attention_mask", "position_ids", "use_cache"} | recorded
    for call in prompts:
        assert torch.equal(call["input_ids"], BATCH.input_ids)
        assert torch.equal(call["attention_mask"], BATCH.attention_mask)
        assert call["position_ids"].tolist() == [[1, 1, 1, 0], [0, 1, 2, 3], [1, 1, 0, 1]]
    assert len(decode) == STEPS
    for step, call in enumerate(decode):
        assert call["input_ids"].tolist() == FORCED[:, step : step + 1].tolist()
        assert call["use_cache"] is True
        assert call["attention_mask"].tolist() == [[*row, *[1] * (step + 1)] for row in BATCH.attention_mask.tolist()]
        assert call["position_ids"].tolist() == [[length + step] for length in BATCH.lengths]
        assert [len(row) for row in call[CACHE_NAME]] == [length + step for length in BATCH.lengths]


def test_without_forced_tokens_its_own_choice_is_fed() -> None:
    trace = run(CountingModel(), BATCH, decode_steps=STEPS)
    forced = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(STEPS):
            tokens.append(answer(tokens, len(tokens) - 1))
        forced.append(tokens[len(prompt) :])
    check_trace(trace, np.array(forced))


def test_what_was_not_asked_for_is_not_run() -> None:
    model = CountingModel()
    trace = run(model, BATCH, hidden=False)
    assert len(model.calls) == 1
    assert (trace.hidden, trace.last_logits) == (None, None)
    assert trace.decode_logits.shape == (3, 0, VOCABULARY)
    assert (trace.forced.shape, trace.forced.dtype) == ((3, 0), np.int64)
    assert (trace.timed_tokens, trace.decode_seconds) == (0, 0.0)


def test_a_fixed_cache_is_made_for_all_tokens_and_a_growing_one_is_not() -> None:
    for fixed, allocated in ((True, (3, 4 + STEPS)), (False, None)):
        model = CountingModel()
        model.optimizations = SimpleNamespace(fixed_kv_cache=fixed)  # type: ignore[assignment]
        check_trace(run(model, BATCH, decode_steps=STEPS, forced=FORCED), FORCED)
        assert getattr(model, "allocated", None) == allocated
        assert (CACHE_NAME in model.calls[1]) is fixed


def test_the_first_decode_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 1 s per look: two looks per timed call."""
    now = iter(range(100))
    monkeypatch.setattr(teacher_forcing.time, "perf_counter", lambda: float(next(now)))
    for steps, timed in ((4, 3), (2, 1), (1, 0)):
        trace = run(CountingModel(), BATCH, decode_steps=steps)
        assert trace.prefill_seconds == 1.0
        assert (trace.timed_tokens, trace.decode_seconds) == (3 * timed, float(timed))


def test_the_reference_sees_prompt_and_forced_tokens_in_one_pass() -> None:
    model = CountingModel(torch.float64)
    trace = run_reference(model, BATCH, FORCED)
    (call,) = model.calls
    assert (call["use_cache"], call["output_hidden_states"]) == (False, True)
    assert trace.prefill_logits.dtype == np.float64
    check_trace(trace, FORCED)
    assert trace.last_logits is not None
    assert np.array_equal(trace.last_logits, trace.prefill_logits[:, -1])
    assert call["attention_mask"].tolist() == [[*row, 1, 1, 1] for row in BATCH.attention_mask.tolist()]


def test_positions_count_the_live_tokens() -> None:
    assert position_ids_of(torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])).tolist() == [[1, 0, 1, 1], [0, 1, 2, 1]]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, np.float32), (torch.float32, np.float32), (torch.float64, np.float64)],
)
def test_answers_are_copied_out_without_rounding(dtype: torch.dtype, kept: Any) -> None:
    tensor = torch.ones(2, dtype=dtype)
    array = teacher_forcing.to_numpy(tensor)
    tensor.zero_()
    assert (array.dtype, array.tolist()) == (kept, [1.0, 1.0])


def test_every_timed_call_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once before the clock is read: work that is still running is no time."""
    events: list[str] = []
    monkeypatch.setattr(teacher_forcing, "_synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(teacher_forcing.time, "perf_counter", lambda: float(len(events.append("look") or events)))
    run(CountingModel(), BATCH, decode_steps=3, hidden=False)
    assert events == ["look", "wait", "look", "look", "wait", "look", "wait", "look", "look", "wait", "look"]


def test_a_trace_that_timed_nothing_says_so() -> None:
    empty = np.empty((1, 0, 4))
    trace = Trace(empty, empty, np.empty((1, 0), np.int64), np.empty((1, 0), bool))
    assert (trace.prefill_seconds, trace.timed_tokens, trace.decode_seconds) == (0.0, 0, 0.0)


def test_a_device_is_waited_for_and_the_host_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(synchronize=waited.append))
    for name in ("cpu", "cuda:0"):
        teacher_forcing._synchronize(torch.device(name))
    assert waited == [torch.device("cuda:0")]


def test_an_optimised_model_is_asked_for_hidden_states_only_where_they_are_wanted() -> None:
    """They take a pass of their own. A dense model has no routing to show."""
    for hidden, passes in ((False, 1), (True, 2)):
        model = CountingModel()
        model.optimizations = SimpleNamespace(fixed_kv_cache=False)  # type: ignore[assignment]
        trace = run(model, BATCH, hidden=hidden)
        assert len(model.calls) == passes
        assert (trace.hidden is not None) is hidden
        assert trace.routing == {}


def test_compiled_steps_are_put_aside_and_back() -> None:
    model = SimpleNamespace(compiled_steps={"decode": run})
    with teacher_forcing.without_compiled_steps(model):
        assert model.compiled_steps == {}
    assert model.compiled_steps == {"decode": run}
    with teacher_forcing.without_compiled_steps(model, asked=False):
        assert model.compiled_steps == {"decode": run}
