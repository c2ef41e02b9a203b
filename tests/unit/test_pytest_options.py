"""Options of the suites, in the root conftest.py: what is no sensible value is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def decode_steps(pytestconfig: pytest.Config) -> Callable[[str], int]:
    """What reads --decode-steps, of the conftest.py that this session runs with."""
    plugins = pytestconfig.pluginmanager.get_plugins()
    return next(
        plugin for plugin in plugins if getattr(plugin, "__file__", "") == str(ROOT / "conftest.py")
    )._decode_steps


@pytest.mark.parametrize(
    "value", ["0", "-1", "", "nan", "inf", "1.5", "1e3", "1_0", "²", "٣", "1000001", "9" * 20, "9" * 5000, "0" * 5000]
)
def test_decode_steps_that_cannot_be_taken(decode_steps: Callable[[str], int], value: str) -> None:
    with pytest.raises(
        pytest.UsageError, match=f"^--decode-steps {value}: must be a positive integer, at most 1000000$"
    ):
        decode_steps(value)


@pytest.mark.parametrize(("value", "number"), [("1", 1), ("007", 7), ("1000000", 1_000_000)])
def test_decode_steps_that_can(decode_steps: Callable[[str], int], value: str, number: int) -> None:
    assert decode_steps(value) == number
