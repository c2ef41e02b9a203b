"""The operator catalogue on a device, sample by sample, with error numbers: no sample's failure stops the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2_npu.conformance.operators import CATALOGUE, Expected, OperatorRecord, Sample, compare_all
from qwen2_npu.conformance.operators.check import (
    by_name,
    call,
    operator_of,
    side_effects,
    to_array,
    to_tensors,
    wrong_dtypes,
)
from qwen2_npu.conformance.operators.rounding import FloatArray

Progress = Callable[[str, int, int], None]
"""Called with what comes next, how many samples are done, and how many there are."""


@dataclass(frozen=True)
class SampleResult:
    """One sample.

    Attributes:
        error: the largest |got − golden| of all outputs, where the golden is defined; None where nothing came back.
        bound_share: the largest error as a part of its bound: above 1 is a failure.
        problems: what is wrong; empty where the sample passes.
        skipped: why it was left out; empty where it ran.
    """

    operator: str
    sample: str
    dtype: str
    error: float | None = None
    bound_share: float | None = None
    problems: tuple[str, ...] = ()
    skipped: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problems and not self.skipped


def run(
    device: str,
    operators: Sequence[OperatorRecord] = tuple(CATALOGUE.values()),
    progress: Progress = lambda label, done, total: None,
) -> list[SampleResult]:
    """Every sample of ``operators`` in every dtype."""
    cases = [(record, sample, dtype) for record in operators for sample in record.samples for dtype in record.dtypes]
    found = []
    for done, (record, sample, dtype) in enumerate(cases):
        progress(record.name, done, len(cases))
        found.append(run_sample(record, sample, dtype, device))
    return found


def run_sample(record: OperatorRecord, sample: Sample, dtype: str, device: str) -> SampleResult:
    """One sample; whatever the device raises is its problem."""
    skip = record.skip(sample.name, dtype, device)
    if skip is not None:
        return SampleResult(record.name, sample.name, dtype, skipped=f"{skip.what}: {skip.reason}")
    arguments = record.arguments(sample.parameters, dtype, sample.seed)
    expected = record.golden(arguments, dtype)
    start = time.perf_counter()
    try:
        tensors = to_tensors(arguments, dtype, device)
        before = {name: value.clone() for name, value in by_name(tensors).items()}
        outputs = call(operator_of(record.name), tensors)
        got = [to_array(output) for output in outputs]
        problems = [str(mismatch) for mismatch in compare_all(expected, got)]
        problems += wrong_dtypes(expected, outputs, dtype)
        problems += side_effects(record, before, by_name(tensors), outputs)
    except Exception as error:  # the device's own errors have many types
        text = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        return SampleResult(record.name, sample.name, dtype, problems=(text,), seconds=time.perf_counter() - start)
    measured = list(_errors(expected, got))
    return SampleResult(
        record.name,
        sample.name,
        dtype,
        error=max((error for error, _ in measured), default=0.0),
        bound_share=max((share for _, share in measured), default=0.0),
        problems=tuple(problems),
        seconds=time.perf_counter() - start,
    )


def _errors(expected: Sequence[Expected], got: Sequence[FloatArray]) -> Iterator[tuple[float, float]]:
    """Largest error, and largest error as a part of its bound, of every output that is checked."""
    for want, have in zip(expected, got, strict=False):
        if want.value is None or have.shape != want.value.shape or not have.size:
            continue
        bound = np.zeros_like(want.value) if want.bound is None else np.broadcast_to(want.bound, want.value.shape)
        defined = np.ones(have.shape, bool) if want.defined is None else np.broadcast_to(want.defined, have.shape)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            error = np.where(have == want.value, 0.0, np.abs(have - want.value))[defined]
            share = np.where(error == 0, 0.0, error / bound[defined])
        if error.size:
            yield float(error.max()), float(share.max())


def totals(results: Sequence[SampleResult]) -> dict[str, dict[str, Any]]:
    """Operator -> how many samples passed, failed and were skipped, and the worst share of a bound."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        own = found.setdefault(result.operator, {"passed": 0, "failed": 0, "skipped": 0, "worst_share_of_bound": 0.0})
        own["skipped" if result.skipped else "passed" if result.passed else "failed"] += 1
        own["worst_share_of_bound"] = max(own["worst_share_of_bound"], result.bound_share or 0.0)
    return found
