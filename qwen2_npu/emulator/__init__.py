"""An Atlas 800I A2 on any Linux machine: the real torch_npu and torchair, computing on the CPU.

``activate()`` comes before the first import of torch. docs/emulator.md says what is real and what is emulated.
"""

from __future__ import annotations

import importlib.util
import sys

from qwen2_npu.emulator.settings import EmulatorError, Settings

__all__ = [
    "EmulatorError",
    "Settings",
    "activate",
    "activate_from_environment",
    "activate_where_needed",
    "is_active",
    "settings",
]

_active: Settings | None = None


def activate(
    soc: str | None = None, device_count: int | None = None, hbm_bytes: int | None = None, cann: str | None = None
) -> Settings:
    """Make this process, and those it starts, see emulated cards.

    What is not given is taken from the launcher (``qwen2-npu emulate``) or parent process, else from ``Settings``:
    eight Ascend910B4.

    Args:
        soc: the card's name; sets its memory, too.
        device_count: cards of the host.
        hbm_bytes: memory per card where it should not be the SoC's own.
        cann: version of CANN that is reported.

    Raises:
        EmulatorError: a real CANN is here, torch_npu is not, it is already loaded, or other settings are active.
    """
    global _active
    from qwen2_npu.emulator import environment

    given = {"soc": soc, "device_count": device_count, "hbm_bytes": hbm_bytes, "cann": cann}
    base = _active or environment.announced() or Settings()
    wanted = base.but(**{name: value for name, value in given.items() if value is not None})
    if _active is not None:
        if _active != wanted:
            raise EmulatorError(f"the emulator is active with {_active}; one process has one set of settings")
        return _active
    if "torch_npu" in sys.modules:
        raise EmulatorError("torch_npu is already imported: activate the emulator before torch and torch_npu")
    environment.refuse_beside_cann()

    from qwen2_npu.emulator import install

    install.install(wanted)
    environment.announce(wanted)
    _active = wanted
    return wanted


def activate_from_environment() -> Settings | None:
    """What a child process of an emulated one does; nothing where no parent has announced settings."""
    from qwen2_npu.emulator import environment

    return activate() if environment.announced() is not None else None


def activate_where_needed() -> bool:
    """Activate where torch_npu is installed and no NPU is: without it, ``import torch`` itself fails there.

    Returns:
        Whether the emulator is active now.

    Raises:
        EmulatorError: it is needed and cannot be provided, QWEN2_NPU_AUTO_EMULATE=0 forbids it, or torch cannot be
            imported beside the real NPU's torch_npu.
    """
    from qwen2_npu.emulator import cuda_build, environment

    if _active is None and importlib.util.find_spec("torch_npu") is not None:
        if environment.signs_of_npu():
            cuda_build.refuse_beside_npu()
        else:
            environment.refuse_unasked()
            activate()
    return is_active()


def is_active() -> bool:
    """Whether this process computes on emulated cards."""
    return _active is not None


def settings() -> Settings:
    """The active settings.

    Raises:
        EmulatorError: the emulator is not active.
    """
    if _active is None:
        raise EmulatorError("the emulator is not active: call qwen2_npu.emulator.activate() before importing torch")
    return _active
