"""Running PyTorch's own operator database (OpInfo) on CPU and on the emulated NPU, and comparing."""

from __future__ import annotations

import functools
import sys
import types
import unittest
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "npu"
SEED = 7
PREFERRED = (torch.float32, torch.int64, torch.bool, torch.complex64)

TOLERANCES = {
    # The fused operator divides by the sum of each row before the second product, PyTorch's CPU kernel after it; the
    # gradients are sums of up to 64 terms of size 1 in fp32.
    "nn.functional.scaled_dot_product_attention": {"rtol": 1.3e-6, "atol": 5e-5},
}
"""Operators that are not computed by PyTorch's own kernel -> how far their float32 results may be from its."""

FOREACH = ("unary", "binary", "pointwise", "reduce", "other")
"""Families of operators on lists of tensors."""

UNINITIALISED = frozenset(("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"))
"""Operators whose results hold anything: only their shapes are compared."""


@functools.cache
def database() -> dict[str, Any]:
    """Name -> OpInfo.

    Their module imports ``expecttest`` for a base class that nothing here uses. And for every list of samples they look
    for a unittest's method on the stack, through the source of every frame: there is none.
    """
    if "expecttest" not in sys.modules:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_methods_invocations as invocations
        from torch.testing._internal import common_utils
        from torch.testing._internal.opinfo import core
    for module in (common_utils, core):
        module.extract_test_fn = lambda: None  # type: ignore[attr-defined]
    families = [getattr(invocations, f"foreach_{family}_op_db") for family in FOREACH]
    every = [*invocations.op_db, *(info for family in families for info in family)]
    return {f"{info.name}.{info.variant_test_name}".rstrip("."): info for info in every}


def dtype_for(info: Any, wanted: torch.dtype | None = None) -> torch.dtype | None:
    """``wanted`` or the first preferred dtype, if the operator has it on CPU."""
    supported = info.supported_dtypes("cpu")
    if wanted is not None:
        return wanted if wanted in supported else None
    return next((dtype for dtype in PREFERRED if dtype in supported), None)


def samples(info: Any, dtype: torch.dtype, count: int, requires_grad: bool = False) -> list[Any]:
    """Up to ``count`` samples spread over what the database has, every second one with non-contiguous tensors."""
    torch.manual_seed(SEED)
    more = {"num_input_tensors": [3]} if info.name.startswith("_foreach") else {}
    found = list(info.sample_inputs("cpu", dtype, requires_grad=requires_grad, **more))
    chosen = found[:: max(1, len(found) // count)][:count]
    strided = all(leaf.layout is torch.strided for sample in chosen for leaf in _tensors(sample.input))
    return [sample.noncontiguous() if index % 2 and strided else sample for index, sample in enumerate(chosen)]


def to_device(value: Any) -> Any:
    """A copy on the NPU; dense tensors keep their strides."""

    def move(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item.detach().to(DEVICE).requires_grad_(item.requires_grad)
        return torch.device(DEVICE) if item == "cpu" or isinstance(item, torch.device) else item

    return tree_map(move, value)


def clone(value: Any) -> Any:
    def copy(item: Any) -> Any:
        return item.detach().clone().requires_grad_(item.requires_grad) if isinstance(item, torch.Tensor) else item

    return tree_map(copy, value)


@dataclass
class Call:
    """One call of an operator on one device: its results, what became of its arguments, and the gradients by them."""

    result: Any
    arguments: Any
    gradients: tuple[torch.Tensor | None, ...] = ()

    @classmethod
    def of(cls, function: Callable[..., Any], sample: Any, on_npu: bool, **more: Any) -> Call:
        """Call ``function`` on copies of the sample. ``more`` are further arguments by name."""
        given = (sample.input, sample.args, sample.kwargs)
        first, args, kwargs = to_device(given) if on_npu else clone(given)
        torch.manual_seed(SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(function(first, *args, **kwargs, **more), (first, args, kwargs))

    def differentiate(self) -> None:
        """Gradients by every argument that wants one, of the results weighted by fixed numbers."""
        outs = [leaf for leaf in _tensors(self.result) if leaf.requires_grad]
        wanted = [leaf for leaf in _tensors(self.arguments) if leaf.requires_grad]
        if outs and wanted:
            weights = [_weights(out) for out in outs]
            self.gradients = torch.autograd.grad(outs, wanted, weights, allow_unused=True, materialize_grads=True)


def _weights(out: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape).to(out.dtype).to(out.device)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def outputs(result: Any, device: str, to_be_resized: bool) -> Any:
    """Tensors for ``out=`` of the right shapes, or empty ones."""

    def make(item: torch.Tensor) -> torch.Tensor:
        return torch.empty([0] if to_be_resized else item.shape, dtype=item.dtype, device=device)

    return make(result) if isinstance(result, torch.Tensor) else tuple(make(item) for item in result)


def compare_values(expected: Any, found: Any) -> None:
    """Both trees hold the same values.

    Raises:
        AssertionError: they do not.
    """
    left, right = _tensors(expected), _tensors(found)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(other, one, equal_nan=True)


def compare(
    expected: Any, found: Any, what: str, values: bool = True, tolerance: dict[str, float] | None = None
) -> None:
    """Both trees hold the same, and the tensors of ``found`` are on the NPU.

    Raises:
        AssertionError: they do not.
    """
    left, right = tree_leaves(expected), tree_leaves(found)
    assert len(left) == len(right), f"{what}: {len(right)} leaves in place of {len(left)}"
    for one, other in zip(left, right, strict=True):
        if not isinstance(one, torch.Tensor):
            equal = one == other or one != one or {str(one), str(other)} == {"cpu", DEVICE}
            assert equal, f"{what}: {other!r} in place of {one!r}"
            continue
        assert other.device.type == DEVICE, f"{what}: a tensor on {other.device}"
        assert (other.shape, other.dtype) == (one.shape, one.dtype), f"{what}: {other.shape}, {other.dtype}"
        if values and one.layout is torch.strided:
            torch.testing.assert_close(
                other.cpu(), one, equal_nan=True, msg=lambda text: f"{what}: {text}", **(tolerance or {})
            )


def check(name: str, mode: str, count: int) -> int:
    """Run an operator's samples on both devices and compare.

    Args:
        mode: "forward", "gradient", "inplace", "out", "bfloat16", "int64".

    Returns:
        How many samples were compared: 0 where the operator has no such mode, or fails on CPU, too.

    Raises:
        Exception: the operator fails on the NPU, or differs.
    """
    info = database()[name]
    if name.startswith("_foreach") and mode in ("gradient", "out"):
        return 0
    dtype = dtype_for(info, {"bfloat16": torch.bfloat16, "int64": torch.int64}.get(mode))
    applies = {
        "gradient": info.supports_autograd and dtype is torch.float32,
        "inplace": info.inplace_variant is not None,
        "out": info.supports_out,
    }.get(mode, True)
    if dtype is None or not applies:
        return 0
    function = info.inplace_variant if mode == "inplace" else info.op or info.method_variant
    compared = 0
    for sample in samples(info, dtype, count, requires_grad=mode == "gradient"):
        if mode == "inplace" and sample.broadcasts_input:
            continue
        try:
            expected = Call.of(function, sample, on_npu=False)
            if mode == "gradient":
                expected.differentiate()
            if mode == "out":
                out = outputs(expected.result, "cpu", to_be_resized=False)
                # Some operators' own out= variants take other outputs, or get them wrong.
                compare_values(expected.result, Call.of(function, sample, on_npu=False, out=out).result)
        except Exception:
            continue
        if mode == "out":
            for to_be_resized in (False, True):
                out = outputs(expected.result, DEVICE, to_be_resized)
                found = Call.of(function, sample, on_npu=True, out=out)
                compare(expected.result, out, "out", name not in UNINITIALISED)
        else:
            found = Call.of(function, sample, on_npu=True)
        if mode == "gradient":
            found.differentiate()
            compare(expected.gradients, found.gradients, "gradient", tolerance=TOLERANCES.get(name))
        compare(expected.result, found.result, "result", name not in UNINITIALISED)
        compare(expected.arguments, found.arguments, "argument", mode != "inplace" or name not in UNINITIALISED)
        compared += 1
    return compared
