"""Faults for tests: a collective that fails, that never answers, or to which one rank contributes nothing.

In the process of the rank, ``with faults.inject("hang", rank=1): ...``; for programs started as they are, the variable
``QWEN2_NPU_EMULATOR_COLLECTIVE_FAULT="hang:rank=1,collective=all_reduce,nth=3"``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from qwen2_npu.emulator.settings import EmulatorError

VARIABLE = "QWEN2_NPU_EMULATOR_COLLECTIVE_FAULT"

KINDS = ("fail", "hang", "drop")


@dataclass
class CollectiveFault:
    """One fault.

    Args:
        kind: "fail" returns HCCL's error for a broken link; "hang" answers nobody until the group's timeout; "drop"
            computes the collective as if this rank had contributed the identity (zeros where nothing is reduced).
        rank: the global rank it happens on; None: every rank.
        collective: its name as in ``communicator``, such as "all_reduce"; None: any.
        nth: which of the matching calls from now on, counted from 1; 0: all of them.
    """

    kind: str
    rank: int | None = None
    collective: str | None = None
    nth: int = 0
    seen: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise EmulatorError(f"collective fault {self.kind!r} is unknown; {', '.join(KINDS)} are known")

    def strikes(self, collective: str, rank: int) -> bool:
        """Whether it happens at this call, which is counted."""
        if self.rank not in (None, rank) or self.collective not in (None, collective):
            return False
        self.seen += 1
        return self.nth in (0, self.seen)

    @classmethod
    def parse(cls, text: str) -> CollectiveFault:
        """From ``KIND[:key=value,...]``.

        Raises:
            EmulatorError: the text is something else.
        """
        kind, _, rest = text.partition(":")
        given = dict(item.partition("=")[::2] for item in rest.split(",") if item)
        try:
            numbers = {name: int(given.pop(name)) for name in ("rank", "nth") if name in given}
            return cls(kind, collective=given.pop("collective", None), **numbers, **given)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise EmulatorError(
                f"{VARIABLE}={text!r} is not a fault ({error}); one looks like hang:rank=1,collective=all_reduce,nth=3"
            ) from error


_injected: list[CollectiveFault] = []


@cache
def _from_environment() -> tuple[CollectiveFault, ...]:
    text = os.environ.get(VARIABLE)
    return (CollectiveFault.parse(text),) if text else ()


@contextlib.contextmanager
def inject(
    kind: str, rank: int | None = None, collective: str | None = None, nth: int = 0
) -> Iterator[CollectiveFault]:
    """Arm a fault in this process; see ``CollectiveFault``."""
    fault = CollectiveFault(kind, rank, collective, nth)
    _injected.append(fault)
    try:
        yield fault
    finally:
        _injected.remove(fault)


def at(collective: str, rank: int) -> str | None:
    """The kind of the fault that happens at this call, if one does.

    Raises:
        EmulatorError: the variable holds no fault.
    """
    struck = [fault.kind for fault in (*_from_environment(), *_injected) if fault.strikes(collective, rank)]
    return struck[0] if struck else None
