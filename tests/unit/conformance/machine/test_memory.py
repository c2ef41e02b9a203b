"""How much memory is free, and how much a process took."""

from __future__ import annotations

import subprocess
import sys

from qwen2_npu.conformance.machine.memory import free_bytes, peak_of

MIB = 1 << 20


def test_free_memory() -> None:
    assert MIB < free_bytes("cpu") < 1 << 50  # type: ignore[operator]
    assert free_bytes("meta") is None


def test_a_peak_that_is_over_before_the_end() -> None:
    code = "import time; x = bytearray(64 << 20); time.sleep(.05); del x; time.sleep(.05)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code])
    peak = peak_of(process, every=0.002)
    assert process.returncode == 0
    assert 64 * MIB < peak.own < 128 * MIB
    assert peak.own <= peak.resident
