"""Random numbers: an NPU generator is a seed and an offset; each draw comes from a CPU generator made of both.

The first draw after ``manual_seed(s)`` is the CPU's own for seed ``s``; saving and restoring the generator's state
repeats draws, as on hardware. Hardware draws other numbers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

STEP = 4
"""How far one operator moves the offset. Philox generators move in fours."""

_MIX = 0x9E3779B97F4A7C15

_default_in_use = threading.Lock()


def replace_generator(at: int, name: str, args: list[Any], kwargs: dict[str, Any], index: int) -> None:
    """Put a CPU generator where the argument ``name`` at position ``at`` holds an NPU one, or none."""
    given = args[at] if at < len(args) else kwargs.get(name)
    if given is not None and given.device.type == "cpu":
        return
    drawn = draw(default_generator(index) if given is None else given)
    if at < len(args):
        args[at] = drawn
    else:
        kwargs[name] = drawn


def default_generator(index: int) -> torch.Generator:
    """The generator of card ``index``."""
    npu: Any = torch.npu  # type: ignore[attr-defined]
    npu._lazy_init()
    return npu.default_generators[index]


def draw(generator: torch.Generator) -> torch.Generator:
    """A CPU generator for one operator; moves ``generator`` on."""
    state = generator.get_state()
    words = state.view(torch.int64)
    seed, offset = int(words[-2]), int(words[-1])
    words = words.clone()
    words[-1] = offset + STEP
    generator.set_state(words.view(torch.uint8))
    return seeded(seed, offset // STEP)


def seeded(seed: int, draws: int) -> torch.Generator:
    """A CPU generator for the draw that follows ``draws`` others from ``seed``."""
    mixed = (seed + draws * _MIX) & ((1 << 64) - 1)
    return torch.Generator("cpu").manual_seed(mixed if mixed < 1 << 63 else mixed - (1 << 64))


@contextlib.contextmanager
def as_default(generator: torch.Generator) -> Iterator[None]:
    """Let operators that take no generator draw from this one; the CPU's own generator does not advance."""
    with _default_in_use:
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(generator.get_state())
        try:
            yield
        finally:
            torch.default_generator.set_state(before)
