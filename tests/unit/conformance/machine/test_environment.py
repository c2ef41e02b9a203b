"""What the software and the device are, as files hold it."""

from __future__ import annotations

import json

from qwen2_npu.conformance.machine.environment import Environment
from qwen2_npu.conformance.machine.verified import Where


def test_files_hold_plain_values() -> None:
    made = Environment.of("cpu")
    assert made.verified.where is Where.CPU
    content = json.loads(json.dumps(made.to_json()))
    assert list(content) == ["python", "platform", "versions", "cann", "device", "verified"]
    assert content["verified"] == "cpu (portable kernels)"
