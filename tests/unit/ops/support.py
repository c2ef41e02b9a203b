"""What the operator tests share: a recorder of ATen calls, exact compile counts, fake inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SNAPSHOT = Path(__file__).parent / "data" / "npu_schemas_2.13.0.txt"
VIEWS = ("view", "transpose", "slice", "unsqueeze", "select", "_unsafe_view", "detach", "expand", "alias")


class Call(NamedTuple):
    name: str
    shapes: list[tuple[int, ...]]


class Recorder(TorchDispatchMode):
    """Lists the ATen calls made inside it, views left out: what is read, and how large it is."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.calls.append(Call(name, [tuple(tensor.shape) for tensor in tensors]))
        return func(*args, **(kwargs or {}))

    def named(self, part: str) -> list[Call]:
        return [call for call in self.calls if part in call.name]

    @property
    def largest_read(self) -> int:
        """Elements of the largest tensor that any call reads."""
        return max(torch.Size(shape).numel() for call in self.calls for shape in call.shapes)


def compiled(function: Any, backend: str = "inductor") -> tuple[Any, CompileCounterWithBackend]:
    """`function` under torch.compile in full graph, dynamic; and the counter of its graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=True), counter
