"""Every fault that the graph suite exists for, injected, and seen to be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from qwen2_npu import Optimizations, Qwen2ForCausalLM, compile_model
from qwen2_npu.conformance.graph import lowering
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.graph import GraphOptions, npu, steps
from qwen2_npu.models.attention import Attention
from qwen2_npu.models.layers import MLP
from qwen2_npu.parallel.collectives import ALONE
from tests.graph import invariants
from tests.graph.counting import GraphCounter
from tests.graph.support import build, generate, prompt

STEPS = 2
"""Of decode: sound is one graph for all, a fault makes one for each."""

Model = Qwen2ForCausalLM


# ---- counts: graphs compiled again, or not used at all --------------------------------------------------------------
def graphs_of(model: Model, device: str, change: Callable[[Model], None]) -> GraphCounter:
    """What is compiled while the changed model generates; sound is 2 graphs, one run per token."""
    with GraphCounter() as counter:
        compile_model(model, "torchair")
        change(model)
        generate(model, prompt(device, 2, 9), 1 + STEPS)
    return counter


def wrap_decode(model: Model, call: Callable[..., torch.Tensor]) -> None:
    """Let ``call(step, tokens, inputs, caches)`` stand before the compiled decode step."""
    step = model.compiled_steps["decode"]
    model.compiled_steps["decode"] = lambda *arguments: call(step, *arguments)


def test_without_a_fault_two_graphs(device: str) -> None:
    counter = graphs_of(build(device), device, lambda model: None)
    assert (counter.compiled, counter.runs) == (2, 1 + STEPS), counter.describe()


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_a_mask_that_grows_with_the_tokens(device: str) -> None:
    """What the guide's sliding_window does where it is passed though unused: a mask of another shape every step."""

    def fault(model: Model) -> None:
        def growing(step: Any, tokens: Any, inputs: Any, caches: Any) -> torch.Tensor:
            live = int(inputs.position_ids.max()) + 1
            pairs = [(k[:, :live].clone(), v[:, :live].clone()) for k, v in caches]
            return step(tokens, inputs._replace(mask=inputs.mask[:, :live].clone()), pairs)

        wrap_decode(model, growing)

    counter = graphs_of(build(device, Optimizations.up_to("fused_qkv")), device, fault)
    assert counter.compiled == 1 + STEPS, counter.describe()
    assert any("size mismatch" in reason for reason in counter.reasons), counter.describe()


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_a_growing_cache(device: str) -> None:
    """DynamicCache in place of the fixed one: new shapes, so a new graph, every step."""
    model = build(device, Optimizations.none())
    options = GraphOptions(dynamic=False, frozen_parameter=True, tiling_schedule_optimize=False, cache_dir=None)
    model.model.rotary.prepare(model.dtype, model.device)
    with GraphCounter() as counter:
        step = npu.compiler("torchair", model, options)(model._forward_growing)
        call = prompt(device, 2, 9)
        cache = DynamicCache()
        with torch.no_grad(), torch._dynamo.config.patch(steps.DYNAMO):
            for count in range(1 + STEPS):
                tokens = call["input_ids"] if count == 0 else call["input_ids"][:, :1].contiguous()
                step(tokens, None, None, cache, slice(-1, None), None)
    assert counter.compiled == 1 + STEPS, counter.describe()


def test_a_position_that_is_a_python_int(device: str) -> None:
    """An integer that a static graph holds as a constant."""

    def fault(model: Model) -> None:
        inner = model.decode_step

        def with_position(tokens: Any, inputs: Any, caches: Any, position: int) -> torch.Tensor:
            return inner(tokens, inputs._replace(position_ids=torch.full_like(tokens, position)), caches)

        options = GraphOptions(dynamic=False, frozen_parameter=True, tiling_schedule_optimize=False, cache_dir=None)
        compiled = npu.compiler("torchair", model, options)(with_position)

        def call(step: Any, tokens: Any, inputs: Any, caches: Any) -> torch.Tensor:
            position = int(inputs.position_ids[0, 0])
            steps.mark_static((tokens, inputs, caches))
            with torch.no_grad(), torch._dynamo.config.patch(steps.DYNAMO):
                return compiled(tokens, inputs, caches, position)

        wrap_decode(model, call)

    counter = graphs_of(build(device, Optimizations.up_to("fused_qkv")), device, fault)
    assert counter.compiled == 1 + STEPS, counter.describe()
    assert any("position" in reason for reason in counter.reasons), counter.describe()


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_live_lengths_in_a_static_graph(device: str) -> None:
    """actual_seq_lengths with dynamic=False, which compile_model refuses."""

    def fault(model: Model) -> None:
        options = GraphOptions(dynamic=False, frozen_parameter=True, tiling_schedule_optimize=True, cache_dir=None)
        compiler = npu.compiler("torchair", model, options)
        model.compiled_steps["decode"] = steps.CompiledStep(model.decode_step, compiler)

    counter = graphs_of(build(device), device, fault)
    assert counter.compiled == 1 + STEPS, counter.describe()
    assert any("actual_seq_lengths" in reason for reason in counter.reasons), counter.describe()


def test_a_backend_per_call(device: str) -> None:
    """A new backend object compiles everything again, even with an equal configuration."""

    def fault(model: Model) -> None:
        def call(step: Any, *arguments: Any) -> torch.Tensor:
            options = GraphOptions(dynamic=True, frozen_parameter=True, tiling_schedule_optimize=True, cache_dir=None)
            return steps.CompiledStep(model.decode_step, npu.compiler("torchair", model, options))(*arguments)

        wrap_decode(model, call)

    counter = graphs_of(build(device), device, fault)
    assert counter.backends == 1 + STEPS, counter.describe()
    assert counter.compiled == 1 + STEPS, counter.describe()


def test_a_branch_on_data(device: str) -> None:
    """What the host must see to go on breaks the graph: with fullgraph it is an error, not a silent split."""
    model = build(device)
    original = model.model.norm.forward

    def branching(hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        normed, total = original(hidden, residual)
        return (normed if normed.abs().max() > 0 else -normed), total

    model.model.norm.forward = branching  # type: ignore[method-assign]
    with GraphCounter() as counter:
        compile_model(model, "torchair")
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"(?i)data-dependent"):
            generate(model, prompt(device, 2, 9), 3)
    assert counter.runs == 0


def test_eager_in_place_of_a_graph(device: str) -> None:
    """A fallback compiles nothing and would pass any "no recompilation" check: runs are counted."""

    def fault(model: Model) -> None:
        wrap_decode(model, lambda step, *arguments: model.decode_step(*arguments))

    counter = graphs_of(build(device), device, fault)
    assert (counter.compiled, counter.runs) == (1, 1), counter.describe()


# ---- what the graph is ----------------------------------------------------------------------------------------------
SMALL = SIZES["1.5B"]


def problems_of(
    phase: lowering.Phase,
    optimizations: Optimizations,
    claimed: Optimizations,
    change: Callable[[Model, list[Any]], Any],
    ranks: int = 1,
    layers: int = 1,
) -> list[str]:
    """What the invariants say of a changed step. ``change`` gets the model and the step's arguments."""
    config = SMALL.config(layers=layers)
    with (
        lowering.fake_ranks(ranks) as group,
        lowering.fake_model(config, optimizations, torch.bfloat16, group) as model,
    ):
        step, arguments = lowering.step_arguments(model, phase, 2, 256, 128)
        changed = list(arguments)
        step = change(model, changed) or step
        raw = lowering.lower_call(step, tuple(changed), dynamic=claimed.ifa_tiling)
    lowered = lowering.describe(raw, config, phase, 2, 128, ranks=ranks)
    return invariants.problems(lowered, claimed, SMALL.vocab // ranks)


def test_without_a_fault_no_problem() -> None:
    for phase in ("prefill", "decode"):
        assert problems_of(phase, Optimizations.all(), Optimizations.all(), lambda model, arguments: None) == []


def expect(problems: list[str], invariant: str) -> None:
    assert any(problem.startswith(f"{invariant}:") for problem in problems), problems


def test_a_view_of_a_stacked_cache() -> None:
    """One tensor for k and v: the write goes to a copy."""

    def change(model: Model, arguments: list[Any]) -> Any:
        stacked = [torch.stack(pair) for pair in arguments[2]]
        arguments[2] = stacked

        def step(tokens: Any, inputs: Any, caches: Any) -> torch.Tensor:
            return model.decode_step(tokens, inputs, [(both[0], both[1]) for both in caches])

        return step

    expect(problems_of("decode", Optimizations.all(), Optimizations.all(), change), "kv_in_place")


def test_a_second_reader_of_the_cache() -> None:
    """Whoever else reads the cache input keeps torchair from writing in place."""

    def change(model: Model, arguments: list[Any]) -> Any:
        def step(tokens: Any, inputs: Any, caches: Any) -> Any:
            before = [key.sum() for key, _ in caches]
            return model.decode_step(tokens, inputs, caches), before

        return step

    expect(problems_of("decode", Optimizations.all(), Optimizations.all(), change), "kv_in_place")


def test_logits_of_the_whole_sequence() -> None:
    def change(model: Model, arguments: list[Any]) -> None:
        arguments[3] = None

    expect(problems_of("prefill", Optimizations.all(), Optimizations.all(), change), "head_on_last_token")


def test_unfused_qkv() -> None:
    fused = Optimizations.up_to("last_layer")
    unfused = fused.replace(fused_qkv=False)
    expect(problems_of("decode", unfused, fused, lambda model, arguments: None), "fused_products")


def test_a_cast_of_the_weights() -> None:
    @contextmanager
    def wide() -> Iterator[None]:
        original = MLP.forward

        def forward(self: MLP, x: torch.Tensor, phase: str) -> torch.Tensor:
            return original(self, x, phase) + self.gate_up_proj.weight.float().sum().to(x.dtype)

        MLP.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            MLP.forward = original  # type: ignore[method-assign]

    with wide():
        problems = problems_of("decode", Optimizations.all(), Optimizations.all(), lambda model, arguments: None)
    expect(problems, "no_wide_copies")


def test_inputs_not_marked_static() -> None:
    """Without mark_static their sizes are symbols, and the tiling of a dynamic shape cannot be sunk."""
    config, optimizations = SMALL.config(layers=1), Optimizations.all()
    with lowering.fake_model(config, optimizations, torch.bfloat16) as model:
        step, arguments = lowering.step_arguments(model, "decode", 2, 256, 128)
        raw = lowering.lower_call(step, arguments, dynamic=True, static=False)
    expect(invariants.input_problems(lowering.describe(raw, config, "decode", 2, 128)), "static_inputs")


def test_angles_read_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attention._rotate_fused

    def rotate(self: Attention, query: torch.Tensor, key: torch.Tensor, cos_sin: Any, kept: Any) -> Any:
        (cos, sin), table = cos_sin, self._rotary[0]
        again = table.cos[torch.zeros(cos.shape[:2], dtype=torch.int64, device=cos.device)]  # type: ignore[index]
        return original(self, query, key, (cos + again.unsqueeze(2), sin), kept)

    monkeypatch.setattr(Attention, "_rotate_fused", rotate)
    before = Optimizations.up_to("last_layer")
    expect(problems_of("decode", before, before, lambda model, arguments: None), "nothing_repeated_in_layers")


@pytest.mark.parametrize(
    ("step", "invariant"),
    [("one_rotary", "one_rotary_operator"), ("kv_scatter", "kv_in_place"), ("kv_scatter", "plain_products")],
)
def test_a_step_of_decode_that_is_claimed_and_not_taken(step: str, invariant: str) -> None:
    without = Optimizations.all().replace(**{step: False})
    expect(problems_of("decode", without, Optimizations.all(), lambda model, arguments: None), invariant)


def test_a_part_of_the_cache_in_place_of_all_of_it() -> None:
    """The operator that writes k and v gets a view: torchair copies it, and the write goes to the copy."""

    def change(model: Model, arguments: list[Any]) -> Any:
        def step(tokens: Any, inputs: Any, caches: Any) -> torch.Tensor:
            return model.decode_step(tokens, inputs, [(key[:, 1:], value[:, 1:]) for key, value in caches])

        return step

    expect(problems_of("decode", Optimizations.all(), Optimizations.all(), change), "kv_in_place")


def test_attention_over_the_whole_cache() -> None:
    full = Optimizations.all().replace(ifa_tiling=False)
    problems = problems_of("decode", full, Optimizations.all(), lambda model, arguments: None)
    expect(problems, "live_attention")


# ---- several cards --------------------------------------------------------------------------------------------------
FUSED = Optimizations.up_to("mm_all_reduce")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("optimizations", [Optimizations.all(), FUSED], ids=["all", "mm_all_reduce"])
def test_several_cards_without_a_fault(phase: lowering.Phase, optimizations: Optimizations) -> None:
    assert problems_of(phase, optimizations, optimizations, lambda model, arguments: None, ranks=2) == []


def left_out(model: Model, arguments: list[Any]) -> None:
    model.model.layers[0].self_attn.o_proj.ranks = ALONE


def once_more(model: Model, arguments: list[Any]) -> Any:
    def step(*given: Any) -> torch.Tensor:
        return model.ranks.all_reduce(model.decode_step(*given))

    return step


def of_another_kind(model: Model, arguments: list[Any]) -> Any:
    def step(*given: Any) -> torch.Tensor:
        return model.ranks.from_first(model.decode_step(*given))

    return step


def not_gathered(model: Model, arguments: list[Any]) -> None:
    model._of_all_ranks = lambda logits: torch.cat([logits, logits], dim=-1)  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [left_out, once_more, of_another_kind, not_gathered])
def test_a_collective_too_few_or_too_many(fault: Callable[[Model, list[Any]], Any]) -> None:
    expect(problems_of("decode", Optimizations.all(), Optimizations.all(), fault, ranks=2), "collectives")


def test_a_fused_collective_that_is_not_fused() -> None:
    """Of two layers: the last one's few rows are summed as in a decode step."""
    nothing: Callable[[Model, list[Any]], Any] = lambda model, arguments: None  # noqa: E731
    expect(problems_of("prefill", Optimizations.all(), FUSED, nothing, ranks=2, layers=2), "collectives")


def test_a_mask_beside_that_of_the_embedding() -> None:
    """One more of an operator that a cut embedding needs."""

    def change(model: Model, arguments: list[Any]) -> Any:
        def step(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            return model.decode_step(ids, *rest).masked_fill(ids.unsqueeze(-1) == 0, 0)

        return step

    expect(
        problems_of("decode", Optimizations.all(), Optimizations.all(), change, ranks=2), "nothing_repeated_in_layers"
    )


def test_a_last_layer_that_computes_every_position() -> None:
    """What last_layer is about, switched off while it is claimed."""
    without = Optimizations.all().replace(last_layer=False)
    problems = problems_of("prefill", without, Optimizations.all(), lambda model, arguments: None)
    expect(problems, "last_layer_on_kept_positions")
