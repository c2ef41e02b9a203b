"""Runs checks on one of several ranks: ``torchrun -m tests.unit.emulator.collectives.ranks FOLDER [NAME …]``.

Writes ``FOLDER/RANK.json``: check -> "" or what went wrong. A rank stops at its first failure; the others then find it
gone.
"""

# ruff: noqa: E402 - garbage collection is off while the rest is imported: a third of the time

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

gc.disable()

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401 - the device, where it is not loaded with torch

from tests.unit.emulator.collectives import eager_checks, fault_checks, model_checks  # noqa: F401 - enter their checks
from tests.unit.emulator.collectives.harness import CHECKS

TIMEOUT = timedelta(seconds=60)

gc.freeze()  # what was imported is no garbage
gc.enable()


def main(folder: str, *names: str) -> int:
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("hccl", timeout=TIMEOUT)
    found: dict[str, str] = {}
    target = Path(folder) / f"{dist.get_rank()}.json"
    for name in names or CHECKS:
        try:
            CHECKS[name]()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            break
    target.write_text(json.dumps(found))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
