"""What torchair holds in place of its ``TorchNpuGraph``: loads a GE graph and runs it on the caller's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwen2_npu.emulator.eager.memory import cpu_view, to_device
from qwen2_npu.emulator.ge.engine import Program
from qwen2_npu.emulator.ge.proto import parse

Tensor = torch.Tensor

loaded: list[Callable[[str, Any, dict[str, str]], None]] = []
"""Called with the name, the ``GraphDef`` and the options of every graph that is loaded: who counts or dumps graphs."""


class EmulatedGraph:
    """A loaded graph."""

    def __init__(self, name: str = "") -> None:
        self.name = str(name)
        self.options: dict[str, str] = {}
        self._program: Program | None = None

    def load(self, ge_graph: Any, options: dict[str, str] | None = None) -> None:
        """Read the graph.

        Raises:
            UnsupportedGraphError: it holds something the engine does not compute, such as an operator that the table
                lacks; the message names it.
        """
        self.options = dict(options or {})
        for call in loaded:
            call(self.name, ge_graph, self.options)
        self._program = Program.plan(self.name, parse(ge_graph))

    def compile(self) -> None:
        """Planning happened in ``load``."""

    def auto_tune(self, example_inputs: Sequence[Tensor] = (), stream: Any = None) -> None:
        """There is no kernel to tune."""

    def run(
        self, inputs: Sequence[Tensor], assigned_outputs: Sequence[Tensor | None] = (), stream: Any = None
    ) -> list[Tensor]:
        """Outputs on the device of the inputs.

        Args:
            inputs: by Data index; on the device or the host.
            assigned_outputs: per output the tensor whose memory it goes to (an input's, as a rule), or None.

        Raises:
            RuntimeError: the graph is not loaded, or an operator failed; the message names the node.
        """
        if self._program is None:
            raise RuntimeError(f"GE graph {self.name!r} is run before it is loaded")
        with torch.no_grad():
            results = self._program.run([_as_cpu(tensor) for tensor in inputs])
            assigned = [*assigned_outputs, *[None] * (len(results) - len(assigned_outputs))]
            # Assigned memory is written last: other outputs may be views of what it holds now.
            card = _card(inputs)
            outputs = [
                to_device(result.contiguous(), card) if tensor is None else tensor
                for result, tensor in zip(results, assigned, strict=True)
            ]
            _write([(result, _as_cpu(t)) for result, t in zip(results, assigned, strict=True) if t is not None])
            return outputs


def _write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Put each value where its target is, unless it is there."""
    pairs = [(value, target) for value, target in pairs if not _same_memory(value, target)]
    targets = {target.untyped_storage().data_ptr() for _, target in pairs}
    # Two targets may swap their contents, so what lies in one of them is taken out before any is written.
    pairs = [
        (value.clone() if value.untyped_storage().data_ptr() in targets else value, target) for value, target in pairs
    ]
    for value, target in pairs:
        target.copy_(value.reshape(target.shape))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _as_cpu(tensor: Tensor) -> Tensor:
    return cpu_view(tensor) if tensor.device.type == "npu" else tensor


def _card(inputs: Sequence[Tensor]) -> int:
    for tensor in inputs:
        if tensor.device.type == "npu":
            return tensor.get_device()
    return int(torch.npu.current_device())  # type: ignore[attr-defined]  # put there by torch_npu
