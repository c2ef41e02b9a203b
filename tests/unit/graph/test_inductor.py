"""What inductor is given, seen where it compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu.graph import GraphOptions, inductor
from qwen2_npu.graph.small_batch import SmallBatchProducts

Given = list[tuple[torch.fx.GraphModule, list[Any], dict[str, Any]]]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    """Graphs, their inputs and their configuration; they run as they are."""
    seen: Given = []

    def compile_fx(module: torch.fx.GraphModule, inputs: list[Any], **others: Any) -> Any:
        seen.append((module, inputs, others["config_patches"]))
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch._dynamo.reset()
    yield seen  # type: ignore[misc]
    torch._dynamo.reset()


def step_of(dynamic: bool, step: Any) -> Any:
    return inductor.compiler(GraphOptions(dynamic, True, False, None))(step)


def test_a_graph_is_never_taken_from_the_disk_cache_and_small_products_have_their_pass(given: Given) -> None:
    """A graph from there is guarded by the order of the rows' lengths."""
    assert step_of(False, lambda x: x + 1)(torch.ones(3)).tolist() == [2, 2, 2]
    ((_, _, settings),) = given
    assert settings["fx_graph_cache"] is False
    assert isinstance(settings["post_grad_custom_pre_pass"], SmallBatchProducts)


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (False, 3)])
def test_live_lengths_are_symbols_where_graphs_are_dynamic(given: Given, dynamic: bool, graphs: int) -> None:
    step = step_of(dynamic, lambda x, lengths: x * lengths[0])
    assert [step(torch.ones(1), [length]).item() for length in (5, 9, 7)] == [5, 9, 7]
    assert len(given) == graphs


def test_a_step_is_one_graph_or_an_error(given: Given) -> None:
    """No part of it runs eagerly without a word."""

    def step(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        step_of(True, step)(torch.ones(3))
    assert given == []
