"""Collectives between emulated cards: torch_npu's own HCCL process groups, with HCCL itself computed over gloo.

``library`` receives HCCL's calls from ``cann/hccl.c``; ``communicator`` computes them on CPU tensors over device
memory, ``reduction`` says in which precision; ``faults`` disturbs them for tests; ``operators`` has torch_npu's
operators that hold a collective. Ranks are processes of one host.

A call completes before it returns, as all work on emulated streams does. Programs that start collectives of several
groups in another order on other ranks, or that wait for a message before a collective its sender takes part in first,
work on hardware, whose streams run beside one another, and time out here.
"""

from __future__ import annotations

from qwen2_npu.emulator.collectives.errors import CollectiveError

__all__ = ["CollectiveError", "install"]


def install() -> None:
    """Answer HCCL's calls, and give torch_npu's fused operators their kernels. Before the eager rule is registered."""
    from qwen2_npu.emulator import runtime
    from qwen2_npu.emulator.collectives import library, operators
    from qwen2_npu.emulator.eager import extra

    library.connect(runtime.library())
    extra.TABLE.update(operators.TABLE)
