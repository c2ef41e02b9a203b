"""Faults for negative controls: wrong results, slow operators, a card without memory. In this process, in eager mode.

Each is a context manager. One that never took effect raises an error on leaving, so that no negative control passes
without its fault. Collectives have theirs in ``collectives.faults``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qwen2_npu.emulator import runtime
from qwen2_npu.emulator.settings import EmulatorError

ChangeInPlace = Callable[[Any], Any]


@dataclass
class OperatorFault:
    """A fault in force.

    Attributes:
        calls: of the operator so far.
        happened: how many of them were disturbed.
        seen: names of all operators that were called.
    """

    operator: str
    nth: int | None
    calls: int = 0
    happened: int = 0
    seen: set[str] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def is_due(self) -> bool:
        """Count a call; whether it is one to disturb."""
        with self._lock:
            self.calls += 1
            due = self.nth is None or self.calls == self.nth
            self.happened += due
            return due


@contextlib.contextmanager
def changed(operator: str, change: ChangeInPlace, nth: int | None = None) -> Iterator[OperatorFault]:
    """Let ``change`` have the floating-point results of an operator, CPU tensors in device memory, to alter in place.

    Args:
        operator: "aten::mm", "npu::npu_rms_norm"; with an overload ("aten::add.Tensor") only that one.
        nth: the call to disturb, 1 for the first; None for every call.

    Raises:
        EmulatorError: no such operator has a kernel on the emulated NPU; or, on leaving, the fault never happened.
    """
    from torch.utils._pytree import tree_leaves

    def after(result: Any) -> Any:
        for leaf in tree_leaves(result):
            if hasattr(leaf, "is_floating_point") and leaf.is_floating_point():
                change(leaf)
        return result

    with _watched(operator, nth, after=after) as fault:
        yield fault


def nan(operator: str, nth: int | None = None) -> contextlib.AbstractContextManager[OperatorFault]:
    """Results full of NaN. Arguments as for ``changed``."""
    return changed(operator, lambda result: result.fill_(float("nan")), nth)


def perturbed(operator: str, eps: float, nth: int | None = None) -> contextlib.AbstractContextManager[OperatorFault]:
    """Results with a relative error of ``eps``. Arguments as for ``changed``."""
    return changed(operator, lambda result: result.mul_(1 + eps), nth)


@contextlib.contextmanager
def slow(operator: str, seconds: float, nth: int | None = None) -> Iterator[OperatorFault]:
    """Calls that take ``seconds`` longer. Arguments as for ``changed``."""
    with _watched(operator, nth, before=lambda: time.sleep(seconds)) as fault:
        yield fault


@contextlib.contextmanager
def out_of_memory(nth: int = 1) -> Iterator[None]:
    """The ``nth`` allocation by the driver and all after it fail, as on a card that others have filled.

    torch_npu's allocator hands small tensors out of blocks it has already: what it holds free is given back first.

    Raises:
        ValueError: nth is below 1.
    """
    import torch

    if nth < 1:
        raise ValueError(f"nth={nth}: the first allocation is 1")
    torch.npu.empty_cache()  # type: ignore[attr-defined]  # put there by torch_npu
    runtime.fail_allocation(nth)
    try:
        yield
    finally:
        runtime.fail_allocation(0)


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Cards with ``size`` bytes, of which what torch_npu's allocator holds free is given back first."""
    import torch

    torch.npu.empty_cache()  # type: ignore[attr-defined]  # put there by torch_npu
    before = torch.npu.mem_get_info()[1]  # type: ignore[attr-defined]
    runtime.set_hbm_bytes(size)
    try:
        yield
    finally:
        runtime.set_hbm_bytes(before)


@contextlib.contextmanager
def _watched(
    operator: str, nth: int | None, *, before: Callable[[], None] | None = None, after: ChangeInPlace | None = None
) -> Iterator[OperatorFault]:
    from qwen2_npu.emulator.eager import registration, tap

    if nth is not None and nth < 1:
        raise ValueError(f"nth={nth}: the first call is 1; None means every call")
    if not registration.has_kernel(operator):
        raise EmulatorError(f"operator={operator!r}: no operator of that name has a kernel on the emulated NPU")
    fault = OperatorFault(operator, nth)

    def listen(plan: Any, run: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        fault.seen.add(plan.op._schema.name)
        if operator not in (plan.op._schema.name, plan.op.name()) or not fault.is_due():
            return run(*args, **kwargs)
        if before is not None:
            before()
        result = run(*args, **kwargs)
        return result if after is None else after(result)

    tap.listeners.append(listen)
    try:
        yield fault
    finally:
        tap.listeners.remove(listen)
    if not fault.happened:
        asked = "" if nth is None else f", and call {nth} was to be disturbed"
        others = ", ".join(sorted(fault.seen)) or "none"
        raise EmulatorError(
            f"the fault in {operator} never happened: it was called {fault.calls} times{asked}; "
            f"operators called meanwhile: {others}"
        )
