"""Small GE graphs, built with torchair's own functions, whose signatures are the operators' prototypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchair  # noqa: F401 - first, so that its parts import
from torchair._ge_concrete_graph import ge_apis as ge
from torchair.ge._ge_graph import GeGraph, torch_type_to_ge_type
from torchair.ge._ge_graph import Tensor as GeTensor

from qwen2_npu.emulator.ge.engine import Program
from qwen2_npu.emulator.ge.graph import EmulatedGraph
from qwen2_npu.emulator.ge.proto import parse

Tensor = torch.Tensor
Make = Callable[..., Any]
"""Adds nodes to the graph under construction: from its Data nodes to what it returns."""

__all__ = ["build", "compute", "ge", "load"]


def build(make: Make, *inputs: Tensor, placement: str = "NPU") -> Any:
    """A graph whose Data nodes ``arg0``, ``arg1``, … have the inputs' shapes and dtypes."""
    graph = GeGraph(name="test")
    with graph:
        data = [
            ge.Data(
                index=index,
                dtype=torch_type_to_ge_type(value.dtype),
                shape=list(value.shape),
                placement=placement,
                node_name=f"arg{index}",
            )
            for index, value in enumerate(inputs)
        ]
        ge.NetOutput(flat(make(*data)))
    return graph


def compute(make: Make, *inputs: Tensor) -> list[Tensor]:
    """What the engine computes from CPU inputs."""
    return Program.plan("test", parse(build(make, *inputs))).run(inputs)


def load(make: Make, *inputs: Tensor) -> EmulatedGraph:
    """The graph as torchair holds it."""
    graph = EmulatedGraph("test")
    graph.load(build(make, *inputs))
    return graph


def flat(made: Any) -> list[GeTensor]:
    if isinstance(made, Sequence):
        return [tensor for item in made for tensor in flat(item)]
    return [made]
