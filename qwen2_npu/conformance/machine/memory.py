"""How much memory is free."""

from __future__ import annotations

from typing import Any

import psutil
import torch


def free_bytes(device: str) -> int | None:
    """Memory that is free on ``device``; None where it does not say."""
    kind = torch.device(device).type
    if kind == "cpu":
        return int(psutil.virtual_memory().available)
    module: Any = getattr(torch, kind, None)
    return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else None
