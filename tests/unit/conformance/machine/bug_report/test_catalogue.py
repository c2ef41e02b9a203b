"""The catalogue on a device: error numbers, and failures that stop nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.machine.bug_report import catalogue
from qwen2_npu.conformance.operators import CATALOGUE, Skip
from qwen2_npu.conformance.operators.check import operator_of

SWIGLU = CATALOGUE["npu_swiglu"]
SAMPLE = SWIGLU.samples[0]


def test_every_sample_in_every_dtype() -> None:
    calls: list[tuple[str, int, int]] = []
    results = catalogue.run("cpu", [SWIGLU], lambda *call: calls.append(call))
    assert len(results) == len(SWIGLU.samples) * len(SWIGLU.dtypes) == len(calls)
    assert all(result.passed for result in results)
    assert all(result.bound_share is not None and result.bound_share <= 1 for result in results)
    assert any(result.error for result in results), "bf16 cannot be exact everywhere"
    assert catalogue.totals(results)["npu_swiglu"]["passed"] == len(results)


def with_operator(monkeypatch: pytest.MonkeyPatch, operator: Any) -> catalogue.SampleResult:
    monkeypatch.setattr(catalogue, "operator_of", lambda name: operator)
    return catalogue.run_sample(SWIGLU, SAMPLE, "bfloat16", "cpu")


def test_a_wrong_result_is_a_problem_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operator_of("npu_swiglu")
    result = with_operator(monkeypatch, lambda *args, **kwargs: right(*args, **kwargs) + 1)
    assert not result.passed
    assert "out of bounds" in result.problems[0]
    assert result.bound_share is not None
    assert result.bound_share > 1


def test_nan_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operator_of("npu_swiglu")
    result = with_operator(monkeypatch, lambda *args, **kwargs: right(*args, **kwargs) * torch.nan)
    assert not result.passed
    assert "not finite" in result.problems[0]


def test_an_error_of_the_device_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("EZ9999: inner error")

    result = with_operator(monkeypatch, broken)
    assert result.problems == ("RuntimeError: EZ9999: inner error",)
    assert result.error is None


def test_skips_are_said() -> None:
    record = replace(SWIGLU, skips=(Skip("bf16", "not there", sample=SAMPLE.name, dtypes=("bfloat16",)),))
    result = catalogue.run_sample(record, SAMPLE, "bfloat16", "cpu")
    assert (result.skipped, result.passed) == ("bf16: not there", False)
    assert catalogue.totals([result])["npu_swiglu"]["skipped"] == 1


def test_what_the_documentation_does_not_define_is_not_measured() -> None:
    from qwen2_npu.conformance.operators import Expected

    value, got = np.zeros(3), np.array([0.5, 9.0, 0.0])
    expected = Expected("y", value, bound=np.ones(3), defined=np.array([True, False, True]))
    assert list(catalogue._errors([expected], [got])) == [(0.5, 0.5)]
