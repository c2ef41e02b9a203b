"""Whose memory a value is in, and what must be copied so that writes in place show where GE shows them.

The engine computes with PyTorch's views, so several values can share memory that GE keeps apart. GE's rules, which
are kept here (its mem_rw_conflict_optimize):

- A Data node is the caller's memory. An operator that writes it in place changes the caller's tensor, and who reads
  the Data node afterwards reads the new content.
- The output of an in-place operator is the memory of the input it wrote. With a producer that has other readers, these
  read what is there when they run.
- A constant is never written: the operator gets a copy.
- Any other output is a value of its own: what a Reshape or a slice of some memory gave stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """One step's use of memory, in slots.

    Attributes:
        reads: inputs.
        makes: outputs.
        writes: output -> the input it is, updated in place.
        view_of: the input whose memory the outputs may share as views, or None.
    """

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    writes: Mapping[int, int] = field(default_factory=dict)
    view_of: int | None = None


@dataclass
class Copies:
    """What one step copies. ``constants``: inputs, for itself. ``snapshots``: values to copy before it runs, for later
    readers. ``results``: whether its results must not be views."""

    constants: tuple[int, ...] = ()
    snapshots: tuple[int, ...] = ()
    results: bool = False


def plan_copies(accesses: Sequence[Access], constants: frozenset[int], outputs: Sequence[int]) -> list[Copies]:
    """The copies of each step.

    Args:
        accesses: the steps, in the order they run.
        constants: slots of constants.
        outputs: slots the graph returns.
    """
    plan = [Copies() for _ in accesses]
    last_use = {slot: step for step, access in enumerate(accesses) for slot in access.reads}
    last_use.update({slot: len(accesses) for slot in outputs})
    written = {slot for access in accesses for slot in access.writes.values()}
    owner: dict[int, int] = {}  # slot -> the slot whose memory it is
    views: dict[int, list[int]] = {}  # owner -> views of it that exist
    for step, access in enumerate(accesses):
        plan[step].constants = tuple(slot for slot in access.writes.values() if slot in constants)
        for target in access.writes.values():
            if target in constants:
                continue
            endangered = views.pop(owner.get(target, target), [])
            plan[step].snapshots += tuple(slot for slot in endangered if last_use.get(slot, -1) >= step)
            for slot in endangered:
                owner[slot] = slot
        for slot in access.makes:
            reference = access.writes.get(slot)
            if reference is not None and reference not in constants:
                owner[slot] = owner.get(reference, reference)
            elif access.view_of is not None and slot in written:
                plan[step].results = True
            elif access.view_of is not None and access.view_of not in constants:
                owner[slot] = owner.get(access.view_of, access.view_of)
                views.setdefault(owner[slot], []).append(slot)
    return plan
