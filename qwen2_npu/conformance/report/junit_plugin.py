"""A pytest plugin: every JUnit file says what its session was verified on, and at which commit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qwen2_npu.conformance.machine.provenance import Provenance


@pytest.fixture(scope="session", autouse=True)
def _provenance(pytestconfig: pytest.Config, record_testsuite_property: Callable[[str, object], None]) -> None:
    if not pytestconfig.getoption("xmlpath", None):
        return
    device = getattr(pytestconfig.option, "device", None) or "cpu"
    for name, value in Provenance.of_device(device).properties().items():
        record_testsuite_property(name, value)
