"""A model with a mixture of experts as graphs: one for decode whatever the router chooses, computing what eager does.

The block alone is in ``test_experts.py``; the lowered graphs of Qwen2-57B-A14B are in
``test_census.py`` with all others, and their bytes here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from qwen2_npu import LADDER, Optimizations, compile_model, emulator
from qwen2_npu.conformance.graph import baselines, lowering
from qwen2_npu.conformance.graph.baselines import DocumentedGraph
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.emulator.ge.engine import listeners
from qwen2_npu.models.experts import SparseMLP
from tests.graph import invariants
from tests.graph.counting import GraphCounter
from tests.graph.support import generate, prompt
from tests.graph.test_experts import ROUTED
from tests.unit.mixture import SMALL, grouped, mixture, mixture_config, needs_mixtures, npu, route
from tests.unit.tokens import assert_same_tokens

pytestmark = needs_mixtures

GRAPHS = [graph for graph in baselines.documented() if graph.size in baselines.MIXTURES]

STEPS = 64


# ---- one graph, and what it computes ---------------------------------------------------------------------------------
@contextmanager
def routings_seen() -> Iterator[list[tuple[int, ...]]]:
    """The experts of every token, of each routing that a graph computes on the emulated NPU."""
    seen: list[tuple[int, ...]] = []

    def watch(node: Any, compute: Any, values: list[Any]) -> Any:
        made = compute(values)
        if node.type == "MoeGatingTopKSoftmax":
            seen.append(tuple(made[1].flatten().tolist()))
        return made

    listeners.append(watch)
    try:
        yield seen
    finally:
        listeners.remove(watch)


def test_one_decode_graph_serves_every_routing(device: str) -> None:
    model, call = mixture(device=device), prompt(device, 2, 9, ragged=True)
    expected = generate(model, call, 1 + STEPS)
    with GraphCounter() as counter, routings_seen() as seen:
        compile_model(model, "torchair")
        assert_same_tokens(generate(model, call, 1 + STEPS), expected, model, call)
    assert (counter.compiled, counter.runs) == (2, 1 + STEPS), counter.describe()
    if emulator.is_active():
        assert len(seen) == 1 + STEPS
        assert len(set(seen[1:])) > STEPS // 4


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16))],
    ids=str,
)
def test_the_graphs_compute_what_eager_computes(dtype: torch.dtype, device: str) -> None:
    """Logits of a prompt and of a step after it."""
    tokens = prompt(device, 2, 9)["input_ids"]
    eager, compiled = mixture(device=device, dtype=dtype), mixture(device=device, dtype=dtype)
    with GraphCounter() as counter:
        found, expected = (logits_of(model, tokens) for model in (compile_model(compiled, "torchair"), eager))
        assert (counter.compiled, counter.runs) == (2, 2), counter.describe()
    for mine, theirs in zip(found, expected, strict=True):
        # The same kernels in the same order: any difference is one of order, a few roundings at most.
        allowed = 8 * torch.finfo(dtype).eps * theirs.abs().max()
        assert (mine - theirs).abs().max() <= allowed


def logits_of(model: Any, tokens: Tensor) -> list[Tensor]:
    cache = model.allocate_cache(len(tokens), tokens.shape[1] + 1)
    with torch.no_grad():
        first = model(tokens, past_key_values=cache, use_cache=True)
        second = model(tokens[:, :1], past_key_values=cache, use_cache=True)
    return [output.logits[:, -1].float().cpu() for output in (first, second)]


# ---- negative controls -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("as_data", [True, False])
def test_sizes_of_the_groups_on_the_host_are_a_graph_for_every_routing(as_data: bool) -> None:
    """How many tokens each expert has, as integers in place of a tensor."""
    import torchair

    weights = SMALL.random(torch.float32, "npu")

    def with_sizes(x: Tensor, sizes: Any) -> Tensor:
        copies, index, _, chosen = route(x, weights.router, SMALL.top)
        sizes = sizes if as_data else torch.tensor(sizes, device=x.device)
        routed = grouped(npu.npu_swiglu(grouped(copies, weights.gate_up, sizes)), weights.down, sizes)
        return npu.npu_moe_finalize_routing(routed, None, None, None, chosen, index, None, drop_pad_mode=2)

    with GraphCounter() as counter:
        backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
        run = torch.compile(with_sizes, backend=backend, fullgraph=True, dynamic=False)
        routings = set()
        for seed in range(3):
            x = torch.randn(4, SMALL.hidden, generator=torch.Generator().manual_seed(seed)).to("npu")
            sizes = route(x, weights.router, SMALL.top)[2]
            routings.add(tuple(sizes.tolist()))
            run(x, sizes if as_data else sizes.tolist())
    assert len(routings) == 3
    assert counter.compiled == (1 if as_data else len(routings)), counter.describe()


def test_experts_that_the_host_looks_up_are_no_graph(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compile_model refuses, and why."""
    model = mixture(Optimizations.up_to(LADDER[-1]), device)
    with pytest.raises(ValueError, match="needs the fused_moe step"):
        compile_model(model, "torchair")
    monkeypatch.setattr("qwen2_npu.graph.check_mode", lambda *given: None)
    with GraphCounter() as counter:
        compile_model(model, "torchair")
        with pytest.raises(GuardOnDataDependentSymNode):
            generate(model, prompt(device, 2, 9), 2)
    assert counter.runs == 0


def problems_of(optimizations: Optimizations, ranks: int = 1, phase: lowering.Phase = "decode") -> list[str]:
    """What the invariants say of a step of the small mixture."""
    config = mixture_config(vocab_size=200)
    lowered = lowering.lower(config, phase, 2, 256, optimizations, prompt=128, tp_size=ranks)
    return invariants.problems(lowered, optimizations, config.vocab_size // ranks)


def test_without_a_fault_no_problem() -> None:
    assert problems_of(Optimizations.all()) == []


@pytest.mark.parametrize("fault", [lambda weight: weight.mT.contiguous().mT, lambda weight: weight * 2])
def test_a_product_of_other_weights_than_they_lie_is_seen(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transpose, or anything else, between the experts' weights and their product."""
    product = torch.ops.npu.npu_grouped_matmul
    monkeypatch.setattr(
        torch.ops.npu, "npu_grouped_matmul", lambda x, weight, **rest: product(x, [fault(weight[0])], **rest)
    )
    problems = problems_of(Optimizations.all())
    assert any(problem.startswith("grouped_experts:") for problem in problems), problems


def test_experts_whose_parts_are_added_one_by_one_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routed and shared experts summed over the ranks apart: three all-reduces in a layer."""

    def forward(self: SparseMLP, x: Tensor, phase: str = "decode") -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        shared = self.ranks.all_reduce(torch.sigmoid(self.shared_expert_gate(rows)) * self.shared_expert(rows))
        routed = self.experts(rows, weights, chosen, torch.zeros_like(rows))
        return (self.ranks.all_reduce(routed) + shared).view(x.shape)

    assert problems_of(Optimizations.all(), ranks=2) == []
    monkeypatch.setattr(SparseMLP, "forward", forward)
    problems = problems_of(Optimizations.all(), ranks=2)
    assert any(problem.startswith("collectives: 4 HcomAllReduce, expected 3") for problem in problems), problems


# ---- the committed graphs of the real size ---------------------------------------------------------------------------
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_bytes_of_the_weights_are_exact(graph: DocumentedGraph) -> None:
    """Every weight once but the embedding table, of which a row per token; of the experts, as many as can have one."""
    census, size = baselines.load(graph), SIZES[graph.size]
    assert census is not None
    tokens = graph.batch * (graph.prompt if graph.phase == "prefill" else 1)
    read = graph.experts_read
    assert (read.least, read.most) == (8, min(64, 8 * tokens))
    weights = size.parameters_with(read.most) + (tokens - size.vocab) * size.hidden
    if graph.phase == "prefill":  # the last layer has one token per row
        weights -= (read.most - graph.last_experts_read.most) * 3 * size.hidden * size.expert_columns
    assert census.of(size.layers).cost.weight_bytes == 2 * weights


@pytest.mark.parametrize("graph", [graph for graph in GRAPHS if graph.phase == "decode"], ids=str)
def test_bytes_of_decode_follow_the_experts_to_be_expected(graph: DocumentedGraph) -> None:
    size, census = SIZES[graph.size], baselines.at_full_size(graph)
    assert census is not None
    expert = 2 * size.layers * 3 * size.hidden * size.expert_columns
    uniform = 64 * (1 - (1 - 8 / 64) ** graph.batch)
    assert census.costs["GroupedMatmul"].weight_bytes == round(expert * uniform)
    assert graph.experts_read.least <= uniform <= graph.experts_read.most


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_a_layer_has_one_block_of_experts_and_two_sums_over_the_ranks(graph: DocumentedGraph) -> None:
    census = baselines.load(graph)
    assert census is not None
    operators = census.layer.operators
    assert {name: operators[name] for name in ROUTED} == ROUTED
    assert "Transpose" not in operators
    fused = graph.optimizations.mm_all_reduce
    wanted = (int(fused), 2 - fused) if SIZES[graph.size].shards > 1 else (0, 0)
    assert (operators.get("MatmulAllReduce", 0), operators.get("HcomAllReduce", 0)) == wanted
