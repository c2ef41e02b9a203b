"""Running PyTorch's own operator database (OpInfo) on CPU and on the emulated NPU, and comparing."""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "npu"
SEED = 7
PREFERRED = (torch.float32, torch.int64, torch.bool, torch.complex64)


def database() -> list[Any]:
    """PyTorch's OpInfos. Their module imports ``expecttest`` for a base class that nothing here uses."""
    if "expecttest" not in sys.modules:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return op_db


def name_of(info: Any) -> str:
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else str(info.name)


def dtype_for(info: Any, wanted: torch.dtype | None = None) -> torch.dtype | None:
    """``wanted`` or the first preferred dtype that the operator has on CPU."""
    supported = info.supported_dtypes("cpu")
    if wanted is not None:
        return wanted if wanted in supported else None
    return next((dtype for dtype in PREFERRED if dtype in supported), None)


def samples(info: Any, dtype: torch.dtype, count: int, requires_grad: bool = False) -> list[Any]:
    """Up to ``count`` samples spread over what the database has, every second one with non-contiguous tensors."""
    torch.manual_seed(SEED)
    found = list(info.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    step = max(1, len(found) // count)
    chosen = found[::step][:count]
    return [sample.noncontiguous() if index % 2 else sample for index, sample in enumerate(chosen)]


def to_device(value: Any) -> Any:
    """A copy on the NPU; views of dense tensors keep their strides."""

    def move(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            moved = item.detach().to(DEVICE)
            return moved.requires_grad_(item.requires_grad)
        if isinstance(item, torch.device):
            return torch.device(DEVICE)
        if isinstance(item, torch.Generator):
            return None
        return item

    return tree_map(move, value)


def clone(value: Any) -> Any:
    return tree_map(
        lambda item: (
            item.detach().clone().requires_grad_(item.requires_grad) if isinstance(item, torch.Tensor) else item
        ),
        value,
    )


@dataclass
class Call:
    """One call of an operator on one device: its results and what became of its arguments."""

    result: Any
    arguments: Any

    @classmethod
    def of(cls, function: Callable[..., Any], sample: Any, on_npu: bool) -> Call:
        given = (sample.input, sample.args, sample.kwargs)
        given = to_device(given) if on_npu else clone(given)
        if on_npu and "device" in given[2]:
            given[2]["device"] = DEVICE
        torch.manual_seed(SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(function(given[0], *given[1], **given[2]), given)


def tensors(value: Any) -> Iterator[Any]:
    return iter(leaf for leaf in tree_leaves(value))


def compare(expected: Any, found: Any, what: str, device: str = DEVICE) -> None:
    """Both trees hold the same, and the tensors of ``found`` are on the NPU.

    Raises:
        AssertionError: they do not.
    """
    left, right = list(tensors(expected)), list(tensors(found))
    assert len(left) == len(right), f"{what}: {len(right)} results in place of {len(left)}"
    for one, other in zip(left, right, strict=True):
        if not isinstance(one, torch.Tensor):
            assert (one, other) == ("cpu", DEVICE) or one == other or one is other or one != one, (
                f"{what}: {other!r} in place of {one!r}"
            )
            continue
        assert other.device.type == device or one.device.type != "cpu", f"{what}: result on {other.device}"
        if one.layout is torch.strided:
            torch.testing.assert_close(other.cpu(), one, equal_nan=True, msg=lambda text: f"{what}: {text}")
