"""The guards that NPU modes keep, by what dynamo does with them: an input of another kind gets a graph of its own, and
the model's hundreds of attributes are not looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.graph import npu
from qwen2_npu.graph.steps import CompiledStep
from qwen2_npu.models import backbone, layers
from tests.unit.small import small_config, small_stock, stock_weights

TOLERANCE = 2e-4  # as in test_qwen2.py

Filter = Callable[[Sequence[Any]], list[bool]]


def model_of(optimizations: Optimizations | None = None, **changes: Any) -> Qwen2ForCausalLM:
    config = small_config(num_hidden_layers=1, **changes)
    weights = stock_weights(small_stock(small_config(num_hidden_layers=1)))
    return Qwen2ForCausalLM.from_state_dict(config, weights, optimizations=optimizations)


class Graphs:
    """A backend that runs what it is given, and counts it."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return module.forward


@contextmanager
def compiled(*models: Qwen2ForCausalLM, keep: Filter = npu.keep_input_guards) -> Iterator[Graphs]:
    """Within it, the steps of ``models`` go through dynamo as in NPU modes."""
    torch._dynamo.reset()
    graphs = Graphs()

    def compiler(step: Any) -> Any:
        own = npu._with_own_code(step)
        return torch.compile(own, backend=graphs, dynamic=True, fullgraph=True, options={"guard_filter_fn": keep})

    for model in models:
        steps = {"prefill": model.prefill_step, "decode": model.decode_step}
        model.compiled_steps = {name: CompiledStep(step, compiler) for name, step in steps.items()}
    yield graphs
    for model in models:
        model.compiled_steps = {}
    torch._dynamo.reset()


@torch.no_grad()
def logits_of(
    model: Qwen2ForCausalLM,
    rows: int,
    width: int,
    *,
    embeds: bool = False,
    keep: int = 1,
    live: int = 0,
    decode: bool = True,
) -> torch.Tensor:
    """Of a ragged prompt and of a step after it."""
    ids = torch.randint(1, 199, (rows, width + 1), generator=torch.Generator().manual_seed(rows * 100 + width))
    mask = torch.ones_like(ids)
    mask[-1, : (width - live if live else width // 2)] = 0
    cache = model.allocate_cache(rows, width + 1)
    found = []
    for stop in (width, width + 1)[: 1 + decode]:
        new = ids[:, cache.get_seq_length() : stop]
        given = {"inputs_embeds": model.get_input_embeddings()(new)} if embeds else {"input_ids": new}
        call = {"attention_mask": mask[:, :stop], "logits_to_keep": keep, CACHE_NAME: cache}
        found.append(model(**given, **call).logits[:, -1:])
    return torch.cat(found, dim=1)


CALLS: dict[str, tuple[dict[str, Any], int]] = {
    "the first": ({"rows": 2, "width": 9}, 2),
    "other lengths": ({"rows": 2, "width": 13, "live": 8}, 0),
    "another batch": ({"rows": 3, "width": 9}, 2),
    "another bucket": ({"rows": 2, "width": 30}, 1),
    "another cache": ({"rows": 2, "width": 130}, 2),
    "all logits": ({"rows": 2, "width": 9, "keep": 0}, 1),
    "embeddings": ({"rows": 2, "width": 9, "embeds": True}, 2),
    "the first again": ({"rows": 2, "width": 9}, 0),
}
"""What is called one after the other -> the graphs that it needs."""

FEW = ("the first", "other lengths", "another batch", "the first again")


def differing(model: Qwen2ForCausalLM, keep: Filter, calls: Iterable[str] = CALLS) -> list[str]:
    """The calls whose graphs are not as many, or compute something else."""
    expected = {name: logits_of(model, **CALLS[name][0]) for name in calls}
    wrong = []
    with compiled(model, keep=keep) as graphs:
        for name in calls:
            call, more = CALLS[name]
            before = graphs.count
            try:
                far = float((logits_of(model, **call) - expected[name]).abs().max()) > TOLERANCE
            except Exception:  # of a graph that was made for something else
                far = True
            if far or graphs.count != before + more:
                wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    ("step", "calls"),
    [
        ("swiglu", FEW),
        pytest.param("swiglu", CALLS, marks=pytest.mark.slow),
        pytest.param("fused_qkv", CALLS, marks=pytest.mark.slow),
    ],
)
def test_no_graph_is_used_for_another_kind_of_call(step, calls):
    """Neither with masks nor with live lengths, which are integers that may change."""
    assert differing(model_of(Optimizations.up_to(step)), npu.keep_input_guards, calls) == []


def test_without_its_guards_a_wrong_graph_is_seen():
    """Negative control."""
    wrong = differing(model_of(), lambda guards: [False for _ in guards])
    assert {"another bucket", "another batch", "another cache", "embeddings"} <= set(wrong)


def test_models_that_differ_in_a_constant_share_no_graph():
    """Both have the same code, and with these guards nothing tells them apart but their compiled steps."""
    models = [model_of(rms_norm_eps=epsilon) for epsilon in (1e-6, 3.0)]
    expected = [logits_of(model, 2, 9, decode=False) for model in models]
    assert (expected[0] - expected[1]).abs().max() > 1
    with compiled(*models) as graphs:
        found = [logits_of(model, 2, 9, decode=False) for model in models]
        assert graphs.count == 2
    assert all((one - other).abs().max() < TOLERANCE for one, other in zip(found, expected, strict=True))


def test_a_longer_rotary_table_needs_new_graphs(monkeypatch):
    """Graphs hold the shape of the table there is."""
    for module in (layers, backbone):
        monkeypatch.setattr(module, "TABLE_ROWS", 64)
    model = model_of()
    expected = logits_of(model, 1, 9, decode=False)
    with compiled(model) as graphs:
        for positions, count in ((128, 1), (128, 1), (300, 2), (300, 2)):
            model.model.rotary.prepare(model.dtype, model.device, positions)
            assert (logits_of(model, 1, 9, decode=False) - expected).abs().max() < TOLERANCE
            assert graphs.count == count
    assert len(model.model.rotary.cos) == 512


def test_of_the_model_the_table_alone_is_looked_at():
    """By the names that dynamo has for them: none of what it would look at in every call but the inputs."""
    kept: set[str] = set()
    dropped: set[str] = set()

    def keep(guards: Sequence[Any]) -> list[bool]:
        answers = npu.keep_input_guards(guards)
        for guard, answer in zip(guards, answers, strict=True):
            (kept if answer else dropped).add(guard.orig_guard.originating_source.name)
        return answers

    model = model_of()
    with compiled(model, keep=keep):
        logits_of(model, 1, 4, decode=False)
    of_model = {name for name in kept if "L['self']" in name}
    assert {name.rsplit(".", 1)[-1] for name in of_model} == {"_buffers['cos']", "_buffers['sin']"}
    assert sum("L['self']" in name for name in dropped) > 50
    for given in ("tokens", "inputs", "caches", "logit_index"):
        assert any(name.startswith(f"L['{given}']") for name in kept), f"no guard on {given}"
        assert not any(name.startswith(f"L['{given}']") for name in dropped), f"guards on {given} are dropped"
