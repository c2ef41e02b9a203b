"""Hooks of the latency gate, for tests of the gate itself: who measures, and where baselines are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qwen2_npu.conformance.perf.runner import Runner


@pytest.hookspec(firstresult=True)
def pytest_qwen2_npu_runner(config: pytest.Config) -> Runner:  # type: ignore[empty-body]
    """Who measures. A stand-in says ``self_test``."""


@pytest.hookspec(firstresult=True)
def pytest_qwen2_npu_baselines(config: pytest.Config) -> Path:  # type: ignore[empty-body]
    """The folder of baselines."""
