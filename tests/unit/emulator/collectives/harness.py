"""What the checks that run on several ranks share: operands every rank can regenerate, and float64 expectations.

A check is a function without arguments that all ranks run; it raises where this rank's result is wrong.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

CHECKS: dict[str, Callable[[], None]] = {}
"""Name -> check, in the order they run."""

SLOW: set[str] = set()
"""Checks left to the nightly run."""

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
"""Rounding to nearest moves a number by no more than this part of it."""


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def slow_check(function: Callable[[], None]) -> Callable[[], None]:
    SLOW.add(function.__name__)
    return check(function)


def rank() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def operand(
    label: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, of: int | None = None
) -> np.ndarray:
    """Values of rank ``of``'s tensor (None: this rank's), exact in ``dtype``: float64, but for bool and complex."""
    generator = np.random.default_rng([zlib.crc32(label.encode()), rank() if of is None else of])
    if dtype is torch.bool:
        return generator.integers(0, 2, shape).astype(bool)
    if dtype.is_complex:
        return (generator.standard_normal(shape) + 1j * generator.standard_normal(shape)).astype(np.complex64)
    if not dtype.is_floating_point:
        low = 0 if dtype is torch.uint8 else -3  # a product over four ranks fits int8
        return generator.integers(low, 4, shape).astype(np.float64)
    return torch.from_numpy(generator.standard_normal(shape)).to(dtype).double().numpy()


def operands(label: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    """Those of all ranks."""
    return [operand(label, shape, dtype, of) for of in range(size())]


def npu(values: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).npu()


def expect(result: torch.Tensor, exact: np.ndarray, dtype: torch.dtype, bound: np.ndarray | float = 0.0) -> None:
    """``result`` is on this rank's card, and within ``bound`` of ``exact``."""
    assert result.device == torch.device("npu", torch.npu.current_device()), f"the result is on {result.device}"
    assert result.dtype == dtype, f"the result is {result.dtype}, not {dtype}"
    assert tuple(result.shape) == exact.shape, f"the result is {tuple(result.shape)}, not {exact.shape}"
    found = result.cpu()
    values = found.numpy() if dtype.is_complex or dtype is torch.bool else found.double().numpy()
    if dtype is torch.bool:
        assert (values == exact).all(), f"{values} is not {exact}"
        return
    wrong = ~(np.abs(values - exact) <= bound)
    assert not wrong.any(), (
        f"{values[wrong][:4]} is not {exact[wrong][:4]} (allowed: {np.broadcast_to(bound, exact.shape)[wrong][:4]})"
    )


def reduced(parts: list[np.ndarray], operation: str, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray | float]:
    """The exact reduction, and how far a float32 reduction that is rounded once to ``dtype`` may be from it."""
    stacked = np.stack(parts)
    exact = {
        "sum": stacked.sum(0),
        "avg": stacked.mean(0),
        "prod": stacked.prod(0),
        "max": stacked.max(0),
        "min": stacked.min(0),
    }[operation]
    if operation in ("max", "min") or not dtype.is_floating_point:
        return exact, 0.0
    weight = np.abs(exact) if operation == "prod" else np.abs(stacked).sum(0)
    # The quotient of avg is rounded to the dtype once more.
    roundings = 2 if operation == "avg" else 1
    return exact, len(parts) * UNIT[torch.float32] * weight + roundings * UNIT[dtype] * np.abs(exact) * 1.01
