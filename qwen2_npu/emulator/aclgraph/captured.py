"""A captured graph: actions on fixed addresses, and where its replay stands."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor


class Action(Protocol):
    """One piece of work on the device."""

    def __call__(self) -> None: ...


@dataclass
class Computation:
    """An operator on CPU tensors over device memory.

    Attributes:
        targets: leaf of the result -> the memory its values were handed out in.
        generator: where its random numbers come from; asked anew at every replay.
    """

    run: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    targets: dict[int, Tensor] = field(default_factory=dict)
    generator: Callable[[], torch.Generator] | None = None

    def __call__(self) -> None:
        args, kwargs = self.args, self.kwargs
        if self.generator is not None:
            drawn = self.generator()
            args = [drawn if isinstance(value, torch.Generator) else value for value in args]
            kwargs = {key: drawn if isinstance(value, torch.Generator) else value for key, value in kwargs.items()}
        leaves = tree_leaves(self.run(*args, **kwargs))
        for index, target in self.targets.items():
            target.copy_(leaves[index])


@dataclass(frozen=True)
class Copy:
    target: int
    source: int
    count: int

    def __call__(self) -> None:
        ctypes.memmove(self.target, self.source, self.count)


@dataclass(frozen=True)
class Fill:
    target: int
    value: int
    count: int

    def __call__(self) -> None:
        ctypes.memset(self.target, self.value, self.count)


@dataclass(frozen=True)
class Wait:
    """The replay goes on when the value at the address is what ``how`` asks for, as aclrtValueWait has it."""

    address: int
    value: int
    how: int


@dataclass(frozen=True)
class Write:
    address: int
    value: int

    def __call__(self) -> None:
        ctypes.c_uint64.from_address(self.address).value = self.value


@dataclass
class Group:
    """Actions that can be replaced between replays, with those of the same operator with other numbers."""

    actions: list[Any] = field(default_factory=list)
    allocations: dict[int, int] = field(default_factory=dict)


@dataclass
class Graph:
    """What one capture recorded.

    Attributes:
        allocations: serial number of an allocation of the driver's -> an address in it that is used.
    """

    actions: list[Any] = field(default_factory=list)
    allocations: dict[int, int] = field(default_factory=dict)

    def used(self) -> Iterator[tuple[int, int]]:
        """Serial number and address of every allocation the graph uses."""
        yield from self.allocations.items()
        for action in self.actions:
            if isinstance(action, Group):
                yield from action.allocations.items()

    def replay(self, is_there: Callable[[Wait], bool]) -> Iterator[Wait]:
        """Run the actions; yields where a value is not there yet."""
        for action in self.actions:
            if isinstance(action, Wait):
                while not is_there(action):
                    yield action
            elif isinstance(action, Group):
                for one in action.actions:
                    one()
            else:
                action()
