"""Which device a name stands for, and whether anything can be computed on it here."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any

import torch

from qwen2_npu.errors import UnsupportedError

NAME = re.compile(r"([a-z_]+)(?::(0|[1-9][0-9]*))?")
"""A device as torch writes it: a type, and perhaps the number of one card."""


def usable(device: torch.device | str | int, *, given_as: str = "") -> torch.device:
    """``device`` as torch's, after a first allocation on it.

    Args:
        given_as: what the user wrote, for the message.

    Raises:
        UnsupportedError: torch knows no such device or has none here, or it is meta, which holds no numbers.
    """
    if str(device).startswith("npu") and importlib.util.find_spec("torch_npu") is not None:
        importlib.import_module("torch_npu")
    try:
        name = str(torch.device(device)) if isinstance(device, int) else str(device)
        reason = _why_not(name)
        if not reason:
            target = torch.device(device)
            torch.empty(1, device=target)  # of nothing, torch_npu opens the card without its streams: backward aborts
            return torch.device("cpu") if target.type == "cpu" else target
    except NotImplementedError:  # of the allocation, in thirty lines
        reason = f"this torch was built without {name}"
    except (RuntimeError, AssertionError, TypeError, ModuleNotFoundError) as error:
        reason = str(error).splitlines()[0]
    raise UnsupportedError(
        f"{given_as or f'device={device!r}'}: not usable here ({reason}); use cpu, or see `qwen2-npu doctor`"
    )


def _why_not(name: str) -> str:
    """What is wrong with a device's name; empty where torch is to be asked."""
    found = NAME.fullmatch(name)
    if found is None:
        return "a device is a type, or a type and a number, such as cpu, npu and npu:1"
    kind, number = found.groups()
    if kind == "meta":
        return "it holds shapes and no numbers"
    if not _is_type(kind):
        if kind == "npu":
            return f"it needs torch_npu, which is missing: pip install torch_npu=={torch.__version__.split('+')[0]}"
        return f"torch knows no type of device {kind!r}"
    return "" if number is None else _no_such_card(kind, int(number))


def _is_type(kind: str) -> bool:
    try:
        torch.device(kind)
    except RuntimeError:
        return False
    return True


def _no_such_card(kind: str, number: int) -> str:
    """Which cards there are, if ``number`` is not one of them."""
    if kind == "cpu":
        return "there is one cpu, without a number" if number else ""
    count_them: Any = getattr(getattr(torch, kind, None), "device_count", None)
    count = number + 1 if count_them is None else int(count_them())
    if number < count:
        return ""
    if count < 2:
        return f"there is one {kind} device, {kind}:0" if count else f"there is no {kind} device"
    return f"there are {count} {kind} devices, {kind}:0 to {kind}:{count - 1}"
