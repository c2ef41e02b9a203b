"""Recording: every operator and copy on a captured stream becomes an action, and leaves no trace in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from qwen2_npu.emulator.aclgraph.captured import Action, Computation, Copy, Fill, Graph, Group, Wait, Write
from qwen2_npu.emulator.eager.memory import cpu_view
from qwen2_npu.emulator.eager.plan import WRITTEN_UNDECLARED, Plan

Tensor = torch.Tensor

POISON = 0xFF
"""Bytes of results between capture and first replay: NaN, or -1."""

HOST = -2
"""In place of a card's number; -1 is pinned memory."""


class Memory(Protocol):
    """What the driver knows about an address."""

    def allocation(self, address: int) -> tuple[int, int]:
        """Serial number of the allocation it lies in, and its card; (0, HOST) for memory of others."""
        ...


class CaptureError(RuntimeError):
    """Something that cannot be captured. As on hardware, the capture is over then."""


class Journal:
    """Contents of memory before it was written."""

    def __init__(self) -> None:
        self._saved: list[tuple[int, bytes]] = []

    def save(self, address: int, count: int) -> None:
        self._saved.append((address, ctypes.string_at(address, count)))

    def undo(self) -> None:
        """Put everything back, the last write first."""
        for address, content in reversed(self._saved):
            ctypes.memmove(address, content, len(content))
        self._saved.clear()


class Capture:
    """One capture under way.

    Operators are computed while they are recorded, so that results have shapes and later operators valid inputs; when
    the capture ends, memory is put back, and results are poisoned.
    """

    def __init__(self, memory: Memory, generator: Callable[[], torch.Generator]) -> None:
        self.graph = Graph()
        self._memory = memory
        self._generator = generator
        self._journal = Journal()
        self._fresh: list[tuple[int, int]] = []
        self._group: Group | None = None
        self._last: tuple[Computation, list[Any]] | None = None

    # ---- what is recorded ----------------------------------------------------------------------------------------
    def operator(self, plan: Plan, run: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Record and compute one operator.

        Raises:
            CaptureError: it reads or writes host memory that is not pinned.
        """
        args, kwargs = at_fixed_addresses(plan, (args, kwargs), self._memory, self.graph.allocations)
        for target in written_by(plan, args, kwargs):
            self._journal.save(*extent(target))
        computation = Computation(run, args, kwargs)
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            computation.generator = self._generator
        result = run(*args, **kwargs)
        self.record(computation)
        self._last = (computation, tree_leaves(result))
        return result

    def stored(self, result: Tensor, out: Tensor) -> None:
        """Note where a fresh result of the last operator went."""
        if self._last is None:
            return
        computation, leaves = self._last
        for index, leaf in enumerate(leaves):
            if leaf is result:
                if out.numel():
                    computation.targets[index] = cpu_view(out)
                    self._note(out.data_ptr(), "result")
                    self._fresh.append(extent(out))
                return

    def copy(self, target: int, source: int, count: int) -> None:
        """Record a copy that torch_npu itself starts.

        Raises:
            CaptureError: as for operators.
        """
        for address in (target, source):
            self._note(address, "copy")
        self._journal.save(target, count)
        self.record(Copy(target, source, count))
        ctypes.memmove(target, source, count)

    def fill(self, target: int, value: int, count: int) -> None:
        self._note(target, "memset")
        self._journal.save(target, count)
        self.record(Fill(target, value, count))
        ctypes.memset(target, value, count)

    def record(self, action: Any) -> None:
        (self.graph.actions if self._group is None else self._group.actions).append(action)

    def wait(self, action: Wait) -> None:
        self._note(action.address, "wait")
        self.record(action)

    def write(self, action: Write) -> None:
        self._note(action.address, "write")
        self.record(action)

    def later(self, action: Action) -> None:
        """Record work that is not done now, such as a collective operation."""
        self.record(action)

    # ---- groups --------------------------------------------------------------------------------------------------
    def begin_group(self) -> bool:
        """Whether a group could be begun: they do not nest."""
        if self._group is not None:
            return False
        self._group = Group()
        return True

    def end_group(self) -> Group | None:
        group, self._group = self._group, None
        if group is not None:
            self.graph.actions.append(group)
        return group

    def end(self) -> Graph:
        """What was recorded. Memory is as it was before the capture, and results are garbage."""
        self._journal.undo()
        for address, count in self._fresh:
            ctypes.memset(address, POISON, count)
        return self.graph

    def _note(self, address: int, what: str) -> None:
        serial, _ = self._memory.allocation(address)
        if not serial:
            raise CaptureError(f"a {what} of host memory that is not pinned, while a graph is captured")
        self.graph.allocations[serial] = address


def at_fixed_addresses(plan: Plan, values: Any, memory: Memory, allocations: dict[int, int]) -> Any:
    """Arguments as a replay will use them: device and pinned memory in place, single host numbers as they are now.

    Args:
        allocations: gets what device and pinned memory is used; see ``Graph``.

    Raises:
        CaptureError: an argument is in host memory that is not pinned.
    """

    def fixed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        address = value.untyped_storage().data_ptr()
        if not address:
            return value
        serial, _ = memory.allocation(address)
        if serial:
            allocations[serial] = address
            return value
        if value.dim() == 0:
            return value.clone()
        raise CaptureError(
            f"{plan.op} with a CPU tensor of shape {tuple(value.shape)} that is not pinned, while a graph is captured: "
            "the copy would wait for the stream. Move the tensor to the device before the capture"
        )

    leaves, spec = tree_flatten(values)
    return tree_unflatten([fixed(leaf) for leaf in leaves], spec)


def written_by(plan: Plan, args: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that the operator writes."""
    found: list[Any] = []
    for index in (*plan.written, *(i for i, name in enumerate(plan.names) if name in WRITTEN_UNDECLARED)):
        found += tree_leaves(args[index] if index < len(args) else kwargs.get(plan.names[index]))
    return [value for value in found if isinstance(value, Tensor) and value.numel()]


def extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and number of bytes from the first to the last element."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()
