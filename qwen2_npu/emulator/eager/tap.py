"""Where operators can be watched or disturbed on their way to the CPU: graph capture and fault injection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from qwen2_npu.emulator.eager.plan import Plan


class OperatorListener(Protocol):
    """Called in place of an operator; ``run(*args, **kwargs)`` computes it on CPU tensors over device memory."""

    def __call__(self, plan: Plan, run: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any: ...


listeners: list[OperatorListener] = []
"""The last one added is called first. Empty in ordinary runs, so that watching costs nothing then."""

leaving: list[Callable[[Plan], None]] = []
"""Called with the plan of an operator whose result goes to the host, before it is computed."""

stored: list[Callable[[torch.Tensor, torch.Tensor], None]] = []
"""Called for each new result, with the CPU tensor computed and the npu tensor it was copied into."""


def call(plan: Plan, run: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``run`` through all listeners."""

    def through(index: int) -> Callable[..., Any]:
        if index < 0:
            return run
        inner = through(index - 1)
        return lambda *a, **k: listeners[index](plan, inner, list(a), k)

    return through(len(listeners) - 1)(*args, **kwargs)
