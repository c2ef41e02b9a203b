"""A GE operator's test against an independent reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.unit.emulator.ge.building import Make, compute, ge

Array = np.ndarray[Any, Any]

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One use of one operator.

    Attributes:
        type: the GE operator.
        make: builds it from the graph's inputs.
        inputs: float32 stands for "the dtype under test"; other dtypes stay.
        expected: from the inputs as numpy arrays (floats in float64) to the outputs.
        size: what the error is relative to, where that is more than the result: the sum of the magnitudes added up.
        roundings: how many roundings of the result's dtype, in the worst case, lie between result and truth.
        halves: whether it is computed in float16 and bfloat16, too.
        note: tells two cases of one operator apart.
    """

    type: str
    make: Make
    inputs: tuple[torch.Tensor, ...]
    expected: Callable[..., Any]
    size: Callable[..., Any] | None = None
    roundings: float = 2.0
    halves: bool = True
    note: str = ""

    def __str__(self) -> str:
        return f"{self.type}-{self.note}" if self.note else self.type

    def dtypes(self) -> tuple[torch.dtype, ...]:
        has_floats = any(value.dtype is torch.float32 for value in self.inputs)
        return (torch.float32, *HALVES) if has_floats and self.halves else (torch.float32,)

    def check(self, dtype: torch.dtype) -> None:
        """Compute it and compare, in float32 from inputs that are views in the engine, too: GE's tensors are dense.

        Raises:
            AssertionError: another number of outputs, another shape, or an element out of its bound.
        """
        inputs = [value.to(dtype) if value.dtype is torch.float32 else value for value in self.inputs]
        exact = [as_array(value) for value in inputs]
        with np.errstate(all="ignore"):
            want = as_list(self.expected(*exact))
            size = [np.abs(value) for value in want] if self.size is None else as_list(self.size(*exact))
        self._compare(compute(self.make, *inputs), want, size)
        if dtype is torch.float32:
            self._compare(compute(from_views(self.make, inputs), *map(reversed_dims, inputs)), want, size)

    def _compare(self, got: list[torch.Tensor], want: list[Any], size: list[Any]) -> None:
        assert len(got) == len(want), f"{len(got)} outputs, expected {len(want)}"
        for index, (have, value, magnitude) in enumerate(zip(got, want, size, strict=True)):
            value = np.asarray(value)
            assert tuple(have.shape) == value.shape, f"output {index}: shape {tuple(have.shape)}, not {value.shape}"
            assert kind(have) == value.dtype.kind or have.dtype == torch.from_numpy(value).dtype, f"output {index}"
            compare(as_array(have), value, magnitude, self.roundings * unit(have.dtype), index)


def reversed_dims(value: torch.Tensor) -> torch.Tensor:
    return value.permute(list(reversed(range(value.dim())))).contiguous()


def from_views(make: Make, inputs: list[torch.Tensor]) -> Make:
    """What takes ``inputs`` with their dimensions reversed, and turns them again before all else."""
    orders = [list(reversed(range(value.dim()))) for value in inputs]

    def turned(*nodes: Any) -> Any:
        pairs = zip(nodes, orders, strict=True)
        return make(*(ge.Transpose(node, order) if len(order) > 1 else node for node, order in pairs))

    return turned


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff; integers and booleans are exact."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def kind(value: torch.Tensor) -> str:
    """numpy's letter of a real or complex dtype; integers and booleans must have the very dtype."""
    return "f" if value.is_floating_point() else "c" if value.is_complex() else ""


def compare(got: Array, want: Array, magnitude: Any, relative: float, index: int) -> None:
    if want.dtype == np.bool_:
        got, want, magnitude = got.astype(int), want.astype(int), 0
    tiny = 1e-7 if relative > 1e-5 else 1e-30  # halves flush what is smaller than this to zero
    with np.errstate(all="ignore"):
        error = np.where((got == want) | (np.isnan(got) & np.isnan(want)), 0.0, np.abs(got - want))
    bound = relative * np.nan_to_num(np.maximum(np.abs(want), magnitude)) + (tiny if relative else 0.0)
    wrong = ~(error <= bound)
    assert not wrong.any(), f"output {index}: got {got[wrong][:4]}, want {want[wrong][:4]}, bound {np.max(bound)}"


def as_array(value: torch.Tensor) -> Array:
    if value.is_complex():
        return value.to(torch.complex128).numpy()
    return value.to(torch.float64).numpy() if value.is_floating_point() else value.numpy()


def as_list(made: Any) -> list[Any]:
    return list(made) if isinstance(made, tuple | list) else [made]


def floats(*shape: int, seed: int = 0, low: float | None = None, high: float = 1.0) -> torch.Tensor:
    """Normal numbers, or uniform ones between ``low`` and ``high``."""
    generator = torch.Generator().manual_seed(seed)
    if low is None:
        return torch.randn(shape, generator=generator)
    return torch.rand(shape, generator=generator) * (high - low) + low


def integers(
    *shape: int, low: int = 0, high: int = 10, seed: int = 0, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def booleans(*shape: int, seed: int = 0) -> torch.Tensor:
    return integers(*shape, high=2, seed=seed).bool()
