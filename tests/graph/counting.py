"""How many graphs were compiled, how often they ran, and why one more was needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

RECOMPILES = "torch._dynamo.guards.__recompiles"
"""dynamo's logger of failed guards."""


class GraphCounter(logging.Handler):
    """Counts what torchair compiles and runs while it is active, on a real NPU as on the emulated one.

    Enter it before ``compile_model``: it wraps the backends that are made from then on.

    Attributes:
        compiled: graphs that torchair's backend was given.
        runs: executions of them.
        backends: backend objects made.
        reasons: the guards that failed, one text per recompilation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.compiled = self.runs = self.backends = 0
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(record.getMessage())

    def __enter__(self) -> GraphCounter:
        import torchair

        torch._dynamo.reset()
        self._make = torchair.get_npu_backend
        torchair.get_npu_backend = self._counting
        torch._logging.set_logs(recompiles=True)
        self._logger = logging.getLogger(RECOMPILES)
        self._propagate, self._handlers = self._logger.propagate, list(self._logger.handlers)
        self._logger.handlers, self._logger.propagate = [self], False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torchair

        torchair.get_npu_backend = self._make
        self._logger.handlers, self._logger.propagate = self._handlers, self._propagate
        torch._logging.set_logs()
        torch._dynamo.reset()

    def _counting(self, **options: Any) -> Callable[..., Any]:
        self.backends += 1
        backend = self._make(**options)

        def counted(module: torch.fx.GraphModule, inputs: list[torch.Tensor], **kwargs: Any) -> Callable[..., Any]:
            self.compiled += 1
            run = backend(module, inputs, **kwargs)

            def counted_run(*args: Any) -> Any:
                self.runs += 1
                return run(*args)

            return counted_run

        return counted

    def describe(self) -> str:
        """What was counted, with the failed guards."""
        lines = [f"{self.compiled} graphs compiled, {self.runs} runs, {self.backends} backends"]
        return "\n".join([*lines, *self.reasons])
