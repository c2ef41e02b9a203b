"""The graph suite needs torch_npu: on a real NPU, or emulated. Elsewhere it is skipped, with the reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent

NEEDS = "needs torch_npu: pip install torch_npu==2.13.0 (no NPU is needed, it runs on the emulated one)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = ""
    if importlib.util.find_spec("torch_npu") is None:
        reason = NEEDS
    elif not str(config.option.device).startswith("npu"):
        reason = f"graphs are lowered for NPUs; --device is {config.option.device}"
    if reason:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
