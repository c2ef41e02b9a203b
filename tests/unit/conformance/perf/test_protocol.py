"""The guide's protocol on small models: what is timed, how often, and the faults it would show."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from qwen2_npu.cache import FixedKVCache
from qwen2_npu.conformance.machine.hardware import Figure, Hardware
from qwen2_npu.conformance.machine.host import Host
from qwen2_npu.conformance.machine.timers import HostTimer
from qwen2_npu.conformance.perf.gate import Against, judge
from qwen2_npu.conformance.perf.protocol import measure
from qwen2_npu.conformance.perf.rows import user_rows
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM
from qwen2_npu.optimizations import Optimizations
from tests.unit.small import small_config, small_stock, stock_weights


def ours(optimizations: Optimizations | None = None, **changes: Any) -> Any:
    config = small_config(num_hidden_layers=2, **changes)
    return Qwen2ForCausalLM.from_state_dict(config, stock_weights(small_stock(config)), optimizations=optimizations)


@pytest.mark.parametrize("model", ["stock", "none", "all"])
def test_one_prefill_then_every_decode_step(model: str) -> None:
    built = {"stock": small_stock, "none": lambda: ours(Optimizations.none()), "all": ours}[model]()
    calls = []
    built.register_forward_hook(lambda module, args, output: calls.append(output.logits.shape[1]))
    found = measure(built, batch=2, input_tokens=8, decode_steps=4, weights="small")
    assert replace(found, warnings=()).faults() == []
    assert found.contexts == (0, 8, 9, 10, 11)
    assert (len(found.decode_ms), found.input_tokens, found.asked_steps, found.weights) == (4, 8, 4, "small")
    assert len(calls) == 2 * 5  # a warm-up of the same length
    assert not found.self_test


def test_the_host_is_watched_while_the_timed_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = ours(), list[Any]()
    right = Host.read
    model.register_forward_hook(lambda module, args, output: said.append("step"))
    monkeypatch.setattr(Host, "read", lambda: said.append("host") or right())
    monkeypatch.setattr(Host, "warnings_since", lambda after, before: (f"{after.seconds > before.seconds}",))
    assert measure(model, batch=1, input_tokens=4, decode_steps=2).warnings == ("True",)
    assert said == [*["step"] * 3, "host", *["step"] * 3, "host"]


def test_every_row_has_a_prompt_of_its_own_and_every_call_the_same() -> None:
    """Rows that are alike would choose the same experts."""
    model, prompts = ours(), list[torch.Tensor]()

    def keep(module: Any, args: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] > 1:
            prompts.append(given["input_ids"])

    model.register_forward_pre_hook(keep, with_kwargs=True)
    measure(model, batch=3, input_tokens=8, decode_steps=1)
    warm, timed = prompts
    assert torch.equal(warm, timed)
    assert len(timed.unique(dim=0)) == 3
    assert timed.min() >= 1  # the padding token is none of them


def test_no_token_ends_it() -> None:
    model = ours()
    with torch.no_grad():
        first = int(model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=1)[0, -1])
    model.generation_config.eos_token_id = list(range(model.vocab_size))
    found = measure(model, batch=1, input_tokens=4, decode_steps=3)
    assert len(found.decode_ms) == 3
    assert first in model.generation_config.eos_token_id  # the model's own configuration is as it was


def test_hooks_are_gone_afterwards() -> None:
    model = ours()
    measure(model, batch=1, input_tokens=4, decode_steps=1)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_decode_latency_needs_a_step() -> None:
    with pytest.raises(ValueError, match="decode_steps=0"):
        measure(ours(), batch=1, input_tokens=4, decode_steps=0)


@pytest.mark.parametrize("build", [small_stock, ours])
def test_more_tokens_than_positions_are_refused(build: Any) -> None:
    model = build()  # of 512 positions
    model.register_forward_pre_hook(lambda module, args: pytest.fail("it was run"))
    with pytest.raises(ValueError, match="510 tokens and 4 new ones need 513 positions, the model has max_position"):
        measure(model, batch=1, input_tokens=510, decode_steps=3)


@pytest.mark.parametrize("build", [small_stock, ours])
def test_as_many_tokens_as_positions_are_measured(build: Any) -> None:
    assert measure(build(), batch=1, input_tokens=510, decode_steps=2).faults() == []


# ---- faults -------------------------------------------------------------------------------------------------------
def test_a_cache_that_does_not_grow_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that forgets what it wrote: every decode step is timed at the prompt's length."""
    right = FixedKVCache.step

    @contextmanager
    def step(cache: FixedKVCache, new_lengths: list[int], tokens: int, **others: Any) -> Iterator[list[int]]:
        with right(cache, new_lengths, tokens, **others) as past:
            yield past
        if tokens == 1:
            cache.crop(-1)

    monkeypatch.setattr(FixedKVCache, "step", step)
    found = measure(ours(), batch=1, input_tokens=8, decode_steps=4)
    wanted = "the KV cache does not grow by one token per step: before step 2 it holds 8 tokens, not 9"
    assert wanted in found.faults()


def test_a_clock_without_synchronize_fails_below_the_floor() -> None:
    """A model whose work runs on after forward() returns, timed by a clock that does not wait for it."""
    model = ours()
    slow = 0.1
    busy_until = [0.0]

    def launch(module: Any, args: Any, output: Any) -> None:
        busy_until[0] = max(busy_until[0], time.perf_counter()) + slow

    def synchronize() -> None:
        time.sleep(max(0.0, busy_until[0] - time.perf_counter()))

    model.lm_head.register_forward_hook(launch)
    # A card on which the floor of this small model is 50 ms: half of what a step takes.
    row = user_rows("0.5B", (1,), ("eager",), ("swiglu",))[1]
    assumed = Figure(988e6 / 50e-3, "B/s", "made up", "inferred")
    peak = Figure(1e15, "FLOP/s", "made up", "inferred")
    card = Hardware("made up", assumed, peak, peak, server="none")
    for wait, passed in ((synchronize, True), (lambda: None, False)):
        found = measure(
            model, batch=1, input_tokens=4, decode_steps=2, timer_for=lambda kind, wait=wait: HostTimer(wait)
        )
        verdict = judge(row, SIZES["0.5B"], replace(found, warnings=()), Against(card=card), strict=False)
        assert verdict.passed is passed, verdict
        assert passed or "a missing synchronize" in verdict.failures[0]


def test_device_memory_is_measured_where_there_is_a_device() -> None:
    kinds = [kind for kind in ("npu", "cuda") if hasattr(torch, kind) and getattr(torch, kind).is_available()]
    run = partial(measure, batch=2, input_tokens=8, decode_steps=2)
    assert run(ours()).peak_bytes is None
    for kind in kinds:
        held = getattr(torch, kind).memory_stats().get("requested_bytes.all.current", 0)
        model = ours().to(kind)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        found = run(model)
        assert found.peak_bytes is not None
        assert weights < found.peak_bytes - held < 3 * weights
        assert len(found.wall_ms) == 3
        assert replace(found, warnings=()).faults() == []
