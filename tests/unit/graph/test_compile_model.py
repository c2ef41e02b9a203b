"""compile_model: same tokens, exact graph counts, and a clear refusal of what cannot be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from qwen2_npu import LADDER, Optimizations, Qwen2ForCausalLM, compile_model, graph
from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.graph import inductor, npu
from qwen2_npu.optimizations import MODES, MODES_OF
from tests.graph.counting import FailedGuards
from tests.unit.mixture import mixture, needs_mixtures
from tests.unit.small import small_config, small_stock, stock_weights
from tests.unit.tokens import assert_same_tokens


class Counter:
    """A torch.compile backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self, guards: FailedGuards) -> None:
        self.guards = guards
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        self.guards.compiled_for(example_inputs)
        return module.forward

    def describe(self) -> str:
        """For each graph why it was compiled."""
        return "\n".join(self.guards.graphs)


@pytest.fixture
def counter(monkeypatch):
    torch._dynamo.reset()
    with FailedGuards() as guards:
        backend = Counter(guards)
        monkeypatch.setattr(inductor, "BACKEND", backend)
        yield backend
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def weights():
    return stock_weights(small_stock(small_config(num_hidden_layers=1)))


def build(weights, optimizations):
    return Qwen2ForCausalLM.from_state_dict(small_config(num_hidden_layers=1), weights, optimizations=optimizations)


def prompt(batch, tokens, ragged=False):
    ids = torch.randint(1, 199, (batch, tokens), generator=torch.Generator().manual_seed(batch * 100 + tokens))
    mask = torch.ones_like(ids)
    if ragged:
        mask[-1, : tokens // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


IN_CI = ("fixed_kv_cache", "flash_attention")
"""Steps whose graphs differ in their inputs; the others change what is inside. The last one is in the fast lane."""


def lane(step: str) -> Any:
    if step == LADDER[-1]:
        return step
    return pytest.param(step, marks=(pytest.mark.slow, pytest.mark.slow_in_ci) if step in IN_CI else pytest.mark.slow)


@pytest.mark.parametrize("step", [lane(step) for step in LADDER])
def test_one_prefill_and_one_decode_graph_over_many_steps_prompts_and_calls(weights, counter, step):
    model = build(weights, Optimizations.up_to(step))
    calls = [prompt(3, 9), prompt(3, 9, ragged=True), prompt(3, 9)]
    expected = [model.generate(**call, max_new_tokens=20, do_sample=False) for call in calls]
    compile_model(model, "inductor")
    for call, tokens in zip(calls, expected, strict=True):
        assert_same_tokens(model.generate(**call, max_new_tokens=20, do_sample=False), tokens, model, call)
    assert counter.graphs == 2, counter.describe()
    # A prompt of the same bucket is no new graph, another bucket one more prefill, another batch one of each.
    for batch, tokens, graphs in ((3, 14, 2), (3, 30, 3), (2, 30, 5)):
        model.generate(**prompt(batch, tokens), max_new_tokens=5, do_sample=False)
        assert counter.graphs == graphs, counter.describe()


@pytest.mark.parametrize(("rows", "ragged"), [(3, True), (1, False)])
@torch.no_grad()
def test_a_loop_of_ones_own_compiles_as_few(weights, counter, rows, ragged):
    """Slices of growing tensors have other strides every step."""
    model, steps = build(weights, Optimizations.all()), 6
    compile_model(model, "inductor")
    given = prompt(rows, 9, ragged)
    cache = model.allocate_cache(rows, 9 + steps)
    ids, mask, width, logits = given["input_ids"], given["attention_mask"], 9, []
    for token in prompt(rows, steps)["input_ids"].split(1, dim=1):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        call = {"attention_mask": mask, "position_ids": positions[:, -width:], CACHE_NAME: cache}
        logits.append(model(ids[:, -width:], **call).logits[:, -1])
        ids, mask, width = torch.cat((ids, token), dim=1), torch.cat((mask, torch.ones_like(token)), dim=1), 1
    assert counter.graphs == 2
    model.compiled_steps = {}
    expected = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions).logits[:, 8:]
    assert (torch.stack(logits, dim=1) - expected).abs().max() < 2e-4


@pytest.mark.parametrize("step", LADDER)
def test_options_follow_from_the_steps_and_the_caller(weights, monkeypatch, step):
    """Tiling is sunk, and live lengths may change, from ifa_tiling on; weights are constants; a caller decides."""
    seen = []
    monkeypatch.setattr(graph, "_compiler", lambda mode, model, options: seen.append(options) or (lambda call: call))
    model = build(weights, Optimizations.up_to(step))
    sunk = model.optimizations.ifa_tiling
    compile_model(model, "inductor")
    assert seen.pop() == graph.GraphOptions(sunk, True, sunk, None)
    compile_model(
        model, "inductor", dynamic=True, frozen_parameter=False, tiling_schedule_optimize=not sunk, cache_dir="graphs"
    )
    assert seen.pop() == graph.GraphOptions(True, False, not sunk, Path("graphs"))


FEW = 2
"""dynamo's own limit is 8 graphs; reaching it takes seconds, and a lower one is as good."""


def test_more_prompt_buckets_than_dynamo_would_allow(weights, counter):
    model = build(weights, Optimizations.all())
    calls = [prompt(1, 8 * count - 1) for count in range(1, FEW + 2)]
    expected = [model.generate(**call, max_new_tokens=2, do_sample=False) for call in calls]
    compile_model(model, "inductor")
    with torch._dynamo.config.patch(recompile_limit=FEW):
        for call, tokens in zip(calls, expected, strict=True):
            assert_same_tokens(model.generate(**call, max_new_tokens=2, do_sample=False), tokens, model, call)
    assert counter.graphs == len(calls) + 1, counter.describe()  # and one for decode


def test_the_count_can_fail(weights, counter):
    """Negative control: a cache that grows with the tokens is a new shape, so a new graph, every step."""
    model = build(weights, Optimizations.all().replace(kv_scatter=False))  # which numbers slots over all rows
    compile_model(model, "inductor")
    step = model.compiled_steps["decode"]

    def growing(tokens, inputs, caches):
        live = max(inputs.actual_seq_lengths)
        return step(tokens, inputs, [(k[:, :live].clone(), v[:, :live].clone()) for k, v in caches])

    model.compiled_steps["decode"] = growing
    model.generate(**prompt(2, 9), max_new_tokens=4, do_sample=False)
    assert counter.graphs == 1 + 3, counter.describe()


@pytest.mark.slow
def test_inductor_generates_the_eager_tokens(weights):
    torch._dynamo.reset()
    model = build(weights, Optimizations.all())
    call = prompt(2, 9, ragged=True)
    expected = model.generate(**call, max_new_tokens=16, do_sample=False)
    compile_model(model, "inductor")
    assert_same_tokens(model.generate(**call, max_new_tokens=16, do_sample=False), expected, model, call)


def test_what_records_layers_runs_uncompiled(weights, counter):
    model = compile_model(build(weights, Optimizations.all()), "inductor")
    ids = prompt(1, 5)["input_ids"]
    assert len(model(ids, output_hidden_states=True).hidden_states) == 2
    assert counter.graphs == 0, counter.describe()


def test_a_growing_cache_is_refused(weights):
    with pytest.raises(UnsupportedError, match="needs the fixed_kv_cache step"):
        compile_model(build(weights, Optimizations.none()), "inductor")


# ---- a mixture of experts -------------------------------------------------------------------------------------------
@needs_mixtures
def test_a_mixture_of_experts_needs_its_step(counter, monkeypatch):
    """Refused by name in every graph mode, before anything is compiled; eager takes either."""
    monkeypatch.setattr(npu, "check_installed", lambda mode, others: None)
    model = mixture(Optimizations.up_to(LADDER[-1]))
    for mode in MODES:
        monkeypatch.setattr(type(model), "device", Device("cpu" if mode in MODES_OF["cpu"] else "npu"))
        if mode == "eager":
            assert compile_model(model, mode) is model
            continue
        with pytest.raises(UnsupportedError, match=f"^mode='{mode}' needs the fused_moe step for a mixture of expe"):
            compile_model(model, mode)
        assert model.compiled_steps == {}
    graph.check_mode("inductor", torch.device("cpu"), Optimizations.up_to(LADDER[-1]), small_config())


@needs_mixtures
def test_one_decode_graph_serves_every_routing(counter):
    """64 steps, in which the tokens go to many different sets of experts."""
    model, routings = mixture(), set()
    chosen = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, given: routings.add(tuple(given[2].flatten().tolist()))
    )
    call = prompt(3, 9, ragged=True)
    expected = model.generate(**call, max_new_tokens=65, min_new_tokens=65, do_sample=False)
    chosen.remove()
    assert len(routings) > 16
    compile_model(model, "inductor")
    found = model.generate(**call, max_new_tokens=65, min_new_tokens=65, do_sample=False)
    assert_same_tokens(found, expected, model, call)
    assert counter.graphs == 2


@needs_mixtures
def test_experts_that_the_host_looks_up_are_no_graph(counter, monkeypatch):
    """Negative control: what the refusal spares a user is an error of the compiler."""
    model = mixture(Optimizations.up_to(LADDER[-1]))
    monkeypatch.setattr(graph, "check_mode", lambda *given: None)
    compile_model(model, "inductor")
    with pytest.raises(GuardOnDataDependentSymNode):
        model.generate(**prompt(2, 9), max_new_tokens=2, do_sample=False)
    assert counter.graphs == 0


@needs_mixtures
@pytest.mark.slow
def test_inductor_generates_the_eager_tokens_of_a_mixture():
    torch._dynamo.reset()
    model = mixture()
    call = prompt(2, 9, ragged=True)
    expected = model.generate(**call, max_new_tokens=16, do_sample=False)
    compile_model(model, "inductor")
    assert_same_tokens(model.generate(**call, max_new_tokens=16, do_sample=False), expected, model, call)


@pytest.mark.parametrize("kind", ["cpu", "cuda", "npu", "xpu", "meta"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_every_device_is_served_or_refused_by_name(mode, kind, monkeypatch, weights):
    """Refused in one line that names the modes to take, and before anything is compiled."""
    monkeypatch.setattr(npu, "check_installed", lambda mode, others: None)
    monkeypatch.setattr(graph, "_compiler", lambda mode, model, options: lambda step: step)
    monkeypatch.setattr(Qwen2ForCausalLM, "device", Device(kind))
    model = build(weights, Optimizations.all())
    if mode in MODES_OF.get(kind, ("eager",)):
        assert compile_model(model, mode) is model
        assert bool(model.compiled_steps) == (mode != "eager")
        return
    with pytest.raises(UnsupportedError) as caught:
        compile_model(model, mode)
    message, takes = str(caught.value), ", ".join(MODES_OF.get(kind, ("eager",)))
    assert message.startswith(f"mode='{mode}' compiles for ")
    assert f", and the device is {kind}:0, whose modes are {takes}: take one of them" in message
    assert "\n" not in message
    assert model.compiled_steps == {}


class Device:
    """A device of a type that torch may know nothing of here."""

    def __init__(self, kind: str) -> None:
        self.type = kind

    def __str__(self) -> str:
        return f"{self.type}:0"


def test_every_mode_compiles_for_some_device():
    assert {mode for modes in MODES_OF.values() for mode in modes} == set(MODES)


def test_mode_comes_from_the_environment_and_is_parsed(weights, monkeypatch):
    monkeypatch.setenv("EXE_MODE", "inductor")
    assert graph.parse_mode(None) == "inductor"
    assert graph.parse_mode("eager") == "eager"
    monkeypatch.setenv("EXE_MODE", "__import__('os')")
    with pytest.raises(UnsupportedError, match=r"EXE_MODE=.*supported modes are eager, torchair, inductor"):
        compile_model(build(weights, Optimizations.all()))
    monkeypatch.delenv("EXE_MODE")
    assert graph.parse_mode(None) == "eager"


def test_back_to_eager(weights):
    model = compile_model(build(weights, Optimizations.all()), "inductor")
    assert set(model.compiled_steps) == {"prefill", "decode"}
    assert compile_model(model, "eager").compiled_steps == {}
