"""Runs one sample of the catalogue on a device and compares it with its golden, element by element.

``check`` is what the tests call and what a failure message tells the reader to call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators import one_rank
from qwen2_npu.conformance.operators.record import Arguments, Expected, OneRank, OperatorRecord, Parameters, is_working
from qwen2_npu.conformance.operators.rounding import Array, FloatArray

if TYPE_CHECKING:
    import torch

Implementation = Callable[..., Any]


@dataclass(frozen=True)
class ElementMismatch:
    """The worst element of one output, or what is wrong with the output as a whole."""

    output: str
    problem: str

    def __str__(self) -> str:
        return f"output {self.output!r}: {self.problem}"


def compare(expected: Expected, got: FloatArray) -> ElementMismatch | None:
    """The worst element, unless |got - value| <= bound where defined and all are finite where the golden is."""
    if expected.value is None:
        return None
    if got.shape != expected.value.shape:
        return ElementMismatch(expected.name, f"shape {got.shape}, expected {expected.value.shape}")
    if got.size == 0:
        return None
    value, bound = (
        expected.value,
        expected.bound if expected.bound is not None else np.zeros_like(expected.value),
    )
    defined = np.ones(value.shape, bool) if expected.defined is None else np.broadcast_to(expected.defined, value.shape)
    lost = ~np.isfinite(got) & (np.isfinite(value) | np.isnan(got))
    if lost.any():
        index = tuple(int(i) for i in np.argwhere(lost)[0])
        want = (
            f"want {float(value[index])!r}"
            if defined[index]
            else "not defined by the documentation, but must be finite"
        )
        return ElementMismatch(
            expected.name, f"{int(lost.sum())} elements not finite, first at {index}: {got[index]}, {want}"
        )
    with np.errstate(invalid="ignore"):
        error = np.where(got == value, 0.0, np.abs(got - value))
    wrong = defined & ~(error <= bound)
    if not wrong.any():
        return None
    with np.errstate(over="ignore"):
        excess = np.where(wrong, error / np.maximum(bound, np.finfo(np.float64).tiny), -1.0)
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), excess.shape))
    return ElementMismatch(
        expected.name,
        f"{int(wrong.sum())} of {int(defined.sum())} elements out of bounds, worst at {worst}: "
        f"got {float(got[worst])!r}, want {float(value[worst])!r}, "
        f"error {float(error[worst]):.3e}, bound {float(bound[worst]):.3e}",
    )


def compare_all(expected: Sequence[Expected], got: Sequence[FloatArray]) -> list[ElementMismatch]:
    """The mismatches of all outputs; a wrong number of outputs is one, too."""
    if len(expected) != len(got):
        return [ElementMismatch("*", f"{len(got)} outputs, expected {len(expected)}")]
    return [found for want, have in zip(expected, got, strict=True) if (found := compare(want, have))]


def to_tensors(arguments: Arguments, dtype: str, device: str = "cpu", strided: bool = False) -> dict[str, Any]:
    """Arguments as the operator takes them; ``strided`` makes tensors of two or more elements non-contiguous."""
    import torch

    def tensor(value: Array) -> torch.Tensor:
        made = torch.from_numpy(np.array(value, order="C"))
        made = made.to(getattr(torch, dtype)) if is_working(value) else made
        made = made.to(device)
        if strided and made.numel() > 1:
            wide = made.new_zeros(*made.shape[:-1], 2 * made.shape[-1])
            wide[..., ::2] = made
            made = wide[..., ::2]
        return made

    def made(value: Any) -> Any:
        if isinstance(value, OneRank):
            return one_rank.communicator_name(device)
        if isinstance(value, list):
            return [made(item) for item in value]
        return tensor(value) if isinstance(value, np.ndarray) else value

    return {name: made(value) for name, value in arguments.items()}


def to_array(tensor: torch.Tensor) -> FloatArray:
    import torch

    return np.asarray(tensor.detach().cpu().to(torch.float64).numpy())


def operator_of(name: str) -> Implementation:
    """torch.ops.npu.<name>: torch_npu's own where it is installed, else this project's kernels."""
    import torch

    import qwen2_npu.ops  # noqa: F401  (registers the kernels)

    found: Implementation = getattr(torch.ops.npu, name)
    return found


def call(
    implementation: Implementation, tensors: dict[str, Any], writes: Sequence[str] = ()
) -> tuple[torch.Tensor, ...]:
    """What it returns; of one that returns nothing, the arguments that it writes."""
    returned = implementation(**tensors)
    if returned is None:
        return tuple(tensors[name] for name in writes)
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def check(
    name: str,
    parameters: Parameters,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    strided: bool = False,
    implementation: Implementation | None = None,
) -> None:
    """Run operator ``name`` on one sample and compare values, dtypes and side effects with its record.

    Args:
        parameters, seed: the sample, as the record's ``build`` takes it.
        strided: make every tensor argument non-contiguous.
        implementation: called in place of torch.ops.npu.<name>.

    Raises:
        AssertionError: an output is out of its bound, an argument was overwritten that must not be, or an output
            aliases (or fails to alias) an argument. The message ends with a script that reproduces it.
    """
    from qwen2_npu.conformance.operators import CATALOGUE

    problems = find_problems(CATALOGUE[name], parameters, dtype, device, seed, strided, implementation)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise AssertionError(
            f"{name} ({dtype} on {device}) disagrees with its golden:\n{lines}\nreproduce with:\n"
            f"{snippet(name, parameters, dtype, device, seed, strided)}"
        )


def snippet(name: str, parameters: Parameters, dtype: str, device: str, seed: int, strided: bool = False) -> str:
    """A script that repeats one check."""
    more = ", strided=True" if strided else ""
    return (
        "  from qwen2_npu.conformance.operators import check\n"
        f"  check({name!r}, {dict(parameters)!r}, dtype={dtype!r}, device={device!r}, seed={seed}{more})"
    )


def find_problems(
    operator: OperatorRecord,
    parameters: Parameters,
    dtype: str,
    device: str = "cpu",
    seed: int = 0,
    strided: bool = False,
    implementation: Implementation | None = None,
) -> list[str]:
    """What ``check`` would complain about, as lines of text."""
    arguments = operator.arguments(parameters, dtype, seed)
    expected = operator.golden(arguments, dtype)
    return run_and_compare(operator, arguments, expected, dtype, device, strided, implementation)


def run_and_compare(
    operator: OperatorRecord,
    arguments: Arguments,
    expected: Sequence[Expected],
    dtype: str,
    device: str = "cpu",
    strided: bool = False,
    implementation: Implementation | None = None,
) -> list[str]:
    """``find_problems`` for arguments and a golden that are already there."""
    tensors = to_tensors(arguments, dtype, device, strided)
    before = {name: value.clone() for name, value in by_name(tensors).items()}
    outputs = call(implementation or operator_of(operator.name), tensors, operator.writes)
    problems = [str(found) for found in compare_all(expected, [to_array(output) for output in outputs])]
    problems += wrong_dtypes(expected, outputs, dtype)
    problems += side_effects(operator, before, by_name(tensors), outputs)
    return problems


def wrong_dtypes(expected: Sequence[Expected], outputs: Sequence[torch.Tensor], dtype: str) -> list[str]:
    wanted = [
        (want.name, f"torch.{want.dtype or dtype}", str(have.dtype))
        for want, have in zip(expected, outputs, strict=False)
    ]
    return [f"output {name!r}: dtype {have}, expected {want}" for name, want, have in wanted if have != want]


def side_effects(
    operator: OperatorRecord,
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> list[str]:
    """Arguments overwritten without leave, and outputs that alias what they must not or not what they must."""
    problems = [
        f"argument {name!r} was overwritten"
        for name, value in before.items()
        if name not in operator.writes and not np.array_equal(_bits(after[name]), _bits(value))
    ]
    for i, output in enumerate(outputs):
        if output.numel() == 0:
            continue
        aliased = {name for name in before if after[name].numel() and after[name].data_ptr() == output.data_ptr()}
        wanted = {operator.writes[i]} if i < len(operator.writes) else set()
        if aliased != wanted:
            problems.append(f"output {i} shares memory with {sorted(aliased)}, expected {sorted(wanted)}")
    return problems


def _bits(tensor: torch.Tensor) -> Array:
    """Its bytes: numpy compares them ten times as fast as torch a mask of four million bools."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def by_name(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among the arguments, those of a list as ``name[0]``, ``name[1]``, …"""
    import torch

    listed = {
        f"{name}[{index}]": item
        for name, value in arguments.items()
        if isinstance(value, list)
        for index, item in enumerate(value)
    }
    return {name: value for name, value in {**arguments, **listed}.items() if isinstance(value, torch.Tensor)}
