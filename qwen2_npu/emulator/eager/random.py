"""Random numbers: an NPU generator is a seed and an offset; each draw comes from a CPU generator made of both.

The first draw after ``manual_seed(s)`` is the CPU's own for seed ``s``; saving and restoring the generator's state
repeats draws, as on hardware. Hardware's numbers are other ones.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen2_npu.emulator.eager.plan import Plan

STEP = 4
"""How far one operator moves the offset. Philox generators move in fours."""

_MIX = 0x9E3779B97F4A7C15


def replace_generator(plan: Plan, args: list[Any], kwargs: dict[str, Any], device: torch.device | None) -> None:
    """Put a CPU generator where an NPU one, or none, was given."""
    for index, name in enumerate(plan.names):
        if name != "generator":
            continue
        given = args[index] if index < len(args) else kwargs.get(name)
        if given is not None and given.device.type == "cpu":
            return
        drawn = draw(given if given is not None else default_generator(device))
        if index < len(args):
            args[index] = drawn
        else:
            kwargs[name] = drawn
        return


def default_generator(device: torch.device | None) -> torch.Generator:
    """The generator of ``device`` (None: the current one)."""
    npu: Any = torch.npu  # type: ignore[attr-defined]
    npu._lazy_init()
    index = device.index if device is not None and device.index is not None else npu.current_device()
    return npu.default_generators[index]


def draw(generator: torch.Generator) -> torch.Generator:
    """A CPU generator for one operator; moves ``generator`` on."""
    state = generator.get_state()
    words = state.view(torch.int64)
    seed, offset = int(words[-2]), int(words[-1])
    words = words.clone()
    words[-1] = offset + STEP
    generator.set_state(words.view(torch.uint8))
    mixed = (seed + (offset // STEP) * _MIX) & ((1 << 64) - 1)
    return torch.Generator("cpu").manual_seed(mixed if mixed < 1 << 63 else mixed - (1 << 64))
