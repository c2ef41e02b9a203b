"""One rank of a job with a small model: what ``qwen2_npu.conformance.perf.rank`` runs, and faults on purpose.

The environment says what one rank does beside measuring: ``RANKS_FAULT`` is "slow", "raises", "is killed" or "hangs",
``RANKS_FAULTY`` the rank.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import qwen2_npu  # noqa: F401 - before torch: the emulated NPU where there is none
from qwen2_npu.conformance import jobs
from qwen2_npu.conformance.perf import rank
from qwen2_npu.conformance.perf.builds import Weights
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.parallel.launch import RankGroup

SMALL = Size("small", 128, 256, 2, 4, 2, 32, 512, tied=False)
TOKENS = 8
"""Of the prompt, in place of 1024."""

SLOWER_MS = 60.0


def measured(request: dict[str, Any], group: RankGroup) -> dict[str, Any]:
    SIZES[SMALL.name] = SMALL
    if str(group.rank) == os.environ.get("RANKS_FAULTY"):
        _fail(os.environ["RANKS_FAULT"])
    return rank.measured(request, group, input_tokens=TOKENS)


def _fail(fault: str) -> None:
    if fault == "raises":
        raise ValueError("this is the cause")
    if fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hangs":
        time.sleep(1000)
    right = Weights.build

    def build(*given: Any) -> Any:
        model = right(*given)
        # After its last collective, so that the other ranks do not wait in the same step.
        model.register_forward_hook(lambda *_: time.sleep(SLOWER_MS / 1e3))
        return model

    Weights.build = build  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(jobs.answer(measured))
