"""Graph mode on the emulated device: torchair's own front end, and an engine that runs the GE graph it lowers to.

``graph`` is what torchair calls; ``proto`` reads the serialised graph, ``engine`` plans and runs it with the analyses
of ``order`` and ``memory``; ``operators`` is the table of GE operators. ``install`` (here) puts all that where
torchair calls CANN's engine.
"""

from __future__ import annotations

import atexit
from types import ModuleType
from typing import Any

from qwen2_npu.emulator import hooks


def install(backend: ModuleType) -> None:
    """Replace what calls CANN's graph engine in ``torchair.core._backend``, right after its import."""
    from qwen2_npu.emulator.ge.graph import EmulatedGraph

    atexit.unregister(backend.finalize_graph_engine)
    backend.initialize_graph_engine = _initialize  # type: ignore[attr-defined]
    backend.finalize_graph_engine = _finalize  # type: ignore[attr-defined]
    backend.TorchNpuGraph = EmulatedGraph  # type: ignore[attr-defined]
    hooks.after_import("torchair._ge_concrete_graph.compat_ir", _every_operator_exists)


def _initialize(global_compile_options: dict[str, str] | None = None) -> None:
    """There is no engine to start."""


def _finalize() -> None:
    import torch

    torch._dynamo.reset()


def _every_operator_exists(compat_ir: Any) -> None:
    """torchair asks CANN's registry whether an operator's optional inputs are known; the newest CANN knows them all."""
    compat_ir.is_cann_compat = lambda optype, runtime_optional_inputs, runtime_optional_attrs: ""
