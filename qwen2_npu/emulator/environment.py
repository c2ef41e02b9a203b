"""What child processes of an emulated one find in their environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from qwen2_npu.emulator.settings import AUTOMATIC, VARIABLE, EmulatorError, Settings

BOOTSTRAP = Path(__file__).parent / "bootstrap"
"""Folder of the ``sitecustomize.py`` that every Python with it on its path runs when it starts."""

RUNTIME = {
    # torch_npu's queue would run copies in another thread, after the kernels here, which run at once.
    "TASK_QUEUE_ENABLE": "0",
}
"""What torch_npu itself must find, in this process and in children."""

TOOLKIT_VARIABLE = "ASCEND_HOME_PATH"

TOOLKIT = Path(__file__).parent / "cann"
"""The folder that TOOLKIT_VARIABLE names on emulated cards: it exists, and holds no part of CANN."""


@contextlib.contextmanager
def toolkit_after() -> Iterator[None]:
    """Name TOOLKIT in TOOLKIT_VARIABLE once the block is done, and nothing inside the block.

    The block imports torch_npu, which looks for the parts of CANN where the variable is set. Programs such as DeepSpeed
    read the variable afterwards and need it set. What it names before does not hold CANN (``refuse_beside_cann``):
    that is TOOLKIT in child processes, or a folder that does not exist.
    """
    os.environ.pop(TOOLKIT_VARIABLE, None)
    yield
    os.environ[TOOLKIT_VARIABLE] = str(TOOLKIT)


def announce(settings: Settings, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let every Python started with ``environment`` compute on emulated cards."""
    environment[VARIABLE] = settings.to_json()
    environment.update(RUNTIME)
    rest = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder != str(BOOTSTRAP)]
    environment["PYTHONPATH"] = os.pathsep.join([str(BOOTSTRAP), *(folder for folder in rest if folder)])


def announced(environment: Mapping[str, str] = os.environ) -> Settings | None:
    """The settings a parent process has announced; None where it has not.

    Raises:
        EmulatorError: the variable holds something else.
    """
    text = environment.get(VARIABLE)
    return Settings.from_json(text) if text else None


def signs_of_npu(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Paths that exist where a real CANN or card is."""
    signs = [Path("/dev/davinci_manager"), Path("/usr/local/Ascend/ascend-toolkit/latest")]
    signs += [Path(environment[name]) for name in (TOOLKIT_VARIABLE, "ASCEND_TOOLKIT_HOME") if environment.get(name)]
    return list(dict.fromkeys(str(sign) for sign in signs if sign.exists() and sign.resolve() != TOOLKIT.resolve()))


def refuse_beside_cann(environment: Mapping[str, str] = os.environ) -> None:
    """Raise where a real CANN or card is: emulated results must not be mistaken for real ones."""
    found = signs_of_npu(environment)
    if found:
        raise EmulatorError(
            f"a real CANN or NPU is here ({', '.join(found)}): the emulator is for machines without; "
            "leave activate() or `emulate` out and use device 'npu' as it is"
        )


def refuse_unasked(environment: Mapping[str, str] = os.environ) -> None:
    """Raise where the user wants an error, not an emulated card that nobody has asked for.

    Raises:
        EmulatorError: QWEN2_NPU_AUTO_EMULATE is 0, or is neither 0 nor 1.
    """
    value = environment.get(AUTOMATIC) or "1"
    if value not in ("0", "1"):
        raise EmulatorError(f"{AUTOMATIC}={value!r}: give 1 (the default) or 0")
    if value == "0" and announced(environment) is None:
        raise EmulatorError(
            f"torch_npu is installed, there is no NPU or CANN here, and {AUTOMATIC}=0 forbids to emulate one: "
            "unset it, or start the program with `qwen2-npu emulate -- …`"
        )
