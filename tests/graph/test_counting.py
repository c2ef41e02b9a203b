"""The counter of graphs: what it counts, and that it names the guard behind a compilation too many."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from tests.graph.counting import NO_GUARD, RECOMPILES, FailedGuards, GraphCounter

torchair = pytest.importorskip("torchair")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """In torchair's place one that runs graphs as they are; what it was asked for."""
    asked: list[dict[str, Any]] = []

    def make(**options: Any) -> Any:
        asked.append(options)
        return lambda module, inputs: module.forward

    monkeypatch.setattr(torchair, "get_npu_backend", make)
    yield asked
    torch._dynamo.reset()


def scaled(x: torch.Tensor, factor: int, others: list[torch.Tensor]) -> torch.Tensor:
    return x * factor + sum(other.sum() for other in others)


def compiled() -> Any:
    return torch.compile(scaled, backend=torchair.get_npu_backend(option=1), dynamic=False)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def test_graphs_runs_and_backends_are_counted(backend: list[dict[str, Any]]) -> None:
    with GraphCounter() as counter:
        run = compiled()
        for _ in range(3):
            assert run(ones(2), 3, [ones(1), ones(1)]).tolist() == [5.0, 5.0]
        assert (counter.compiled, counter.runs, counter.backends) == (1, 3, 1)
    assert backend == [{"option": 1}]
    assert counter.describe().splitlines() == [
        "1 graphs compiled, 3 runs, 1 backends",
        f"graph 1 of float32[2], 2 × float32[1]: {NO_GUARD}",
    ]


@pytest.mark.parametrize(
    ("arguments", "guard"),
    [
        ((ones(3), 3, [ones(1)]), "tensor 'x' size mismatch at index 0. expected 2, actual 3"),
        ((ones(2, 2)[:, 0], 3, [ones(1)]), "tensor 'x' stride mismatch at index 0. expected 1, actual 2"),
        ((ones(2).double(), 3, [ones(1)]), "tensor 'x' dtype mismatch. expected Float, actual Double"),
        ((ones(2), 4, [ones(1)]), "factor == 3"),
        ((ones(2), 3, [ones(4)]), "tensor 'others[0]' size mismatch"),
        ((ones(2), 3, [ones(1), ones(1)]), "len(others) == 1"),
    ],
)
def test_each_recompilation_names_its_guard(
    backend: list[dict[str, Any]], arguments: tuple[Any, ...], guard: str
) -> None:
    with GraphCounter() as counter:
        run = compiled()
        run(ones(2), 3, [ones(1)])
        run(*arguments)
    assert (counter.compiled, counter.runs) == (2, 2)
    assert len(counter.reasons) == 1
    first, second = counter.graphs
    assert first == f"graph 1 of float32[2], float32[1]: {NO_GUARD}"
    assert second.startswith("graph 2 of ")
    assert guard in second
    assert guard in counter.describe()


def test_what_no_guard_explains_is_said_to_be_so(backend: list[dict[str, Any]]) -> None:
    with GraphCounter() as counter:
        for _ in range(2):
            torch._dynamo.reset()
            compiled()(ones(2), 3, [ones(1)])
    assert (counter.compiled, counter.runs, counter.backends) == (2, 2, 2)
    assert [graph.endswith(NO_GUARD) for graph in counter.graphs] == [True, True]


def test_reasons_belong_to_the_graph_after_them(backend: list[dict[str, Any]]) -> None:
    with GraphCounter() as counter:
        run = compiled()
        for size in (2, 3, 4):
            run(ones(size), 3, [ones(1)])
    assert ["actual 3" in graph for graph in counter.graphs] == [False, True, False]
    assert ["actual 4" in graph for graph in counter.graphs] == [False, False, True]


def test_afterwards_all_is_as_it_was(backend: list[dict[str, Any]]) -> None:
    logger = logging.getLogger(RECOMPILES)
    before = (torchair.get_npu_backend, list(logger.handlers), logger.propagate)
    counter = GraphCounter()
    with suppress(ZeroDivisionError), counter:
        run = compiled()
        run(ones(2), 3, [ones(1)])
        raise ZeroDivisionError
    assert (torchair.get_npu_backend, list(logger.handlers), logger.propagate) == before
    torch._dynamo.reset()
    again = compiled()
    for size in (2, 3):
        again(ones(size), 3, [ones(1)])
    assert (counter.compiled, counter.runs, counter.reasons) == (1, 1, [])


def test_graphs_from_before_are_compiled_again_and_counted(backend: list[dict[str, Any]]) -> None:
    run = compiled()
    run(ones(2), 3, [ones(1)])
    with GraphCounter() as counter:
        compiled()(ones(2), 3, [ones(1)])
        assert (counter.compiled, counter.runs) == (1, 1)


def test_the_first_reason_is_kept_too() -> None:
    guards = FailedGuards()
    for text in ("first", "second"):
        guards.emit(logging.LogRecord("name", logging.DEBUG, "", 0, text, (), None))
    guards.compiled_for([])
    guards.compiled_for([])
    assert guards.graphs == ["graph 1 of : first; second", f"graph 2 of : {NO_GUARD}"]


def test_reasons_go_to_the_counter_alone_and_to_nobody_afterwards(backend: list[dict[str, Any]]) -> None:
    logger, other = logging.getLogger(RECOMPILES), FailedGuards()
    with GraphCounter() as counter:
        assert (logger.handlers, logger.propagate) == ([counter], False)
        run = compiled()
        for size in (2, 3):
            run(ones(size), 3, [ones(1)])
    assert len(counter.reasons) == 1
    logger.addHandler(other)
    try:
        run = compiled()
        for size in (2, 3):
            run(ones(size), 3, [ones(1)])
    finally:
        logger.removeHandler(other)
    assert other.reasons == []


def test_what_was_compiled_before_is_no_reason(backend: list[dict[str, Any]]) -> None:
    compiled()(ones(2), 3, [ones(1)])
    with GraphCounter() as counter:
        compiled()(ones(3), 3, [ones(1)])
    assert (counter.compiled, counter.reasons) == (1, [])


def test_inputs_that_are_no_tensors_are_named_by_type() -> None:
    guards = FailedGuards()
    guards.compiled_for([ones(2), 7, 8, ones(2), ones(2).long()])
    assert guards.graphs == [f"graph 1 of 2 × float32[2], 2 × int, int64[2]: {NO_GUARD}"]
