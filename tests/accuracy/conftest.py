"""What the header of a run on a real checkpoint says."""

from __future__ import annotations

import pytest


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Whether the stock model is taken whole, and why not."""
    from tests.accuracy.pairs import dtypes_of, streamed

    reasons = {dtype: streamed(config, dtype) for dtype in dtypes_of(config)}
    return [f"stock model in {dtype}: layer by layer, {reason}" for dtype, reason in reasons.items() if reason]
