"""How many graphs were compiled, how often they ran, and why one more was needed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch

RECOMPILES = "torch._dynamo.guards.__recompiles"
"""dynamo's logger of failed guards."""

NO_GUARD = "no guard failed: compiled for the first time, with another backend, or after dynamo was reset"


class FailedGuards(logging.Handler):
    """Takes down, while it is active, which guards failed before each compilation.

    Attributes:
        reasons: one text per recompilation.
        graphs: one text per graph: what it was given, and why it was compiled. Filled by :meth:`compiled_for`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []
        self.graphs: list[str] = []
        self._said = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(record.getMessage())

    def __enter__(self) -> Self:
        torch._logging.set_logs(recompiles=True)
        self._logger = logging.getLogger(RECOMPILES)
        self._propagate, self._handlers = self._logger.propagate, list(self._logger.handlers)
        self._logger.handlers, self._logger.propagate = [self], False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._logger.handlers, self._logger.propagate = self._handlers, self._propagate
        torch._logging.set_logs()

    def compiled_for(self, inputs: Sequence[Any]) -> None:
        """A backend was given a graph with these inputs; the guards that failed since the last one are its reason."""
        why, self._said = self.reasons[self._said :], len(self.reasons)
        self.graphs.append(f"graph {len(self.graphs) + 1} of {_shapes(inputs)}: {'; '.join(why) or NO_GUARD}")


def _shapes(inputs: Sequence[Any]) -> str:
    """The kinds of inputs and how many there are of each."""
    kinds = [
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else type(value).__name__
        for value in inputs
    ]
    return ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in Counter(kinds).items())


class GraphCounter(FailedGuards):
    """Counts what torchair compiles and runs while it is active, on a real NPU as on the emulated one.

    Enter it before ``compile_model``: it wraps the backends that are made from then on.

    Attributes:
        compiled: graphs that torchair's backend was given.
        runs: executions of them.
        backends: backend objects made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.compiled = self.runs = self.backends = 0

    def __enter__(self) -> Self:
        import torchair

        torch._dynamo.reset()
        self._make = torchair.get_npu_backend
        torchair.get_npu_backend = self._counting
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torchair

        torchair.get_npu_backend = self._make
        super().__exit__(kind, error, trace)
        torch._dynamo.reset()

    def _counting(self, **options: Any) -> Callable[..., Any]:
        self.backends += 1
        backend = self._make(**options)

        def counted(module: torch.fx.GraphModule, inputs: list[torch.Tensor], **kwargs: Any) -> Callable[..., Any]:
            self.compiled += 1
            self.compiled_for(inputs)
            run = backend(module, inputs, **kwargs)

            def counted_run(*args: Any) -> Any:
                self.runs += 1
                return run(*args)

            return counted_run

        return counted

    def describe(self) -> str:
        """What was counted, and for each graph why it was compiled."""
        lines = [f"{self.compiled} graphs compiled, {self.runs} runs, {self.backends} backends"]
        return "\n".join([*lines, *self.graphs])
