"""Which device a name stands for, and whether anything can be computed on it here."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from qwen2_npu.errors import UnsupportedError


def usable(device: torch.device | str | int, *, given_as: str = "") -> torch.device:
    """``device`` as torch's, after a first allocation on it.

    Args:
        given_as: what the user wrote, for the message.

    Raises:
        UnsupportedError: torch knows no such device or has none here, or it is meta, which holds no numbers.
    """
    if str(device).startswith("npu") and importlib.util.find_spec("torch_npu") is not None:
        importlib.import_module("torch_npu")
    reason = "it holds shapes and no numbers"
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
        if target.type != "meta":
            return target
    except (RuntimeError, AssertionError, TypeError, ModuleNotFoundError) as error:
        reason = str(error).splitlines()[0]
    raise UnsupportedError(
        f"{given_as or f'device={device!r}'}: not usable here ({reason}); use cpu, or see `qwen2-npu doctor`"
    )
