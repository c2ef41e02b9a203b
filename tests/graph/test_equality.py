"""A GE graph computes what eager computes, at every position of the accuracy suite's batches.

Eager accuracy comes first, as the guide asks: where a configuration has not been shown to agree with the stock model,
that is what fails, and it says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu import LADDER, Optimizations, compile_model
from qwen2_npu.conformance.accuracy import locate_error
from qwen2_npu.conformance.accuracy.compare import Comparison
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace
from tests.accuracy.pairs import pair_of
from tests.graph.counting import GraphCounter

WEIGHTS = ("qwen2-0.5b", "qwen2-7b")
"""head_dim 64 and 128: other rotary operators."""

DTYPES = ("float32", "bfloat16", "float16")
SHAPE = "ragged"

FAST = {(LADDER[-1], "bfloat16", "qwen2-7b"), ("flash_attention", "float32", "qwen2-0.5b")}

CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in product(LADDER, DTYPES, WEIGHTS)
]


@pytest.mark.parametrize(("step", "dtype", "weights"), CASES)
def test_graph_equals_eager(step: str, dtype: str, weights: str, pytestconfig: pytest.Config) -> None:
    pair = pair_of(pytestconfig, weights, dtype)
    optimizations = Optimizations.up_to(step)
    model = pair.build(optimizations)
    eager_comparison, eager = pair.compare(model, SHAPE)
    assert eager_comparison.passed, _eager_first(eager_comparison)
    with GraphCounter() as counter:
        compiled = compile_model(pair.build(optimizations), "torchair")
        graph = locate_error.trace_model(compiled, pair.batch(SHAPE), pair.traces(SHAPE)[0])
        assert counter.runs > 0, "nothing ran in a graph"
    wrong = list(differences(eager, graph, dtype))
    assert not wrong, wrong


def differences(eager: Any, graph: Any, dtype: str) -> Iterator[str]:
    """Of two traces. The same kernels in the same order: they may differ by an order of sums, a few roundings."""
    for name in ("prefill_logits", "decode_logits"):
        expected, found = _live(eager, name), _live(graph, name)
        allowed = 8 * torch.finfo(getattr(torch, dtype)).eps * np.abs(expected).max()
        worst = np.abs(expected - found).max()
        if not worst <= allowed:
            yield f"{name}: graph and eager differ by {worst:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["prefill_logits", "decode_logits"])
def test_a_difference_is_seen_at_its_limit(name: str, dtype: str) -> None:
    valid = np.array([[False, True]])
    eager: Any = Trace(np.full((1, 2, 3), 4.0), np.full((1, 2, 3), 4.0), np.zeros((1, 2), int), valid)
    limit = 32 * torch.finfo(getattr(torch, dtype)).eps
    for off, seen in ((limit, False), (1.01 * limit, True), (np.nan, True)):
        values = np.full((1, 2, 3), 4.0)
        values[0, -1, 1] += off
        if name == "prefill_logits":
            values[0, 0] = 9.0  # padding
        wrong = list(differences(eager, replace(eager, **{name: values}), dtype))
        assert [text.split(":")[0] for text in wrong] == [name] * seen


def _live(trace: Any, name: str) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = getattr(trace, name)
    return values[trace.valid] if name == "prefill_logits" else values


def _eager_first(comparison: Comparison) -> str:
    return f"eager accuracy comes before graph mode, and is not shown: {'; '.join(comparison.failures())}"
