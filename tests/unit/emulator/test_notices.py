"""What is not printed, and what is."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest

from qwen2_npu import emulator
from qwen2_npu.emulator import notices


def printed(*lines: str) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), notices.without_toolkit_warning():
        for line in lines:
            print(line)
    return stream.getvalue()


def test_one_line_goes_and_others_stay():
    assert printed("before", f"{notices.TOOLKIT} environment variable is not set.", "after") == "before\nafter\n"
    assert printed("ASCEND_HOME_PATH is mine", "") == "ASCEND_HOME_PATH is mine\n\n"


@pytest.mark.slow
@pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")
def test_a_first_tensor_prints_nothing_and_counts_as_the_first():
    code = "import torch; x = torch.ones(3, device='npu'); s = torch.npu.memory_stats()\n"
    code += "print(s['allocation.all.allocated'], torch.npu.max_memory_allocated() == torch.npu.memory_allocated())"
    command = [sys.executable, "-m", "qwen2_npu.emulator", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert (done.stdout, done.stderr) == ("1 True\n", "")
