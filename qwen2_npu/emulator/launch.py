"""Running any program, with all the processes it starts, on emulated cards.

The program takes this process's place (exec), so its exit status and the signals it gets are its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from qwen2_npu.emulator import environment
from qwen2_npu.emulator.settings import GIB, HBM_GIB, MAX_BYTES, MAX_DEVICES, EmulatorError, Settings

CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": ["-h", "--help"]}
"""Click settings of a command that passes on, unchanged, what follows its own options."""

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit statuses, as a shell gives them."""

_OPTIONS = (
    click.option("--soc", type=click.Choice(sorted(HBM_GIB)), help="Name of the card.  [default: Ascend910B4]"),
    click.option("--device-count", type=click.IntRange(1, MAX_DEVICES), help="Cards of the host.  [default: 8]"),
    click.option(
        "--hbm-gib",
        type=float,
        metavar="GIB",
        help="Memory per card, enforced.  [default: the card's own, 32 for Ascend910B4]",
    ),
    click.option("--cann", metavar="VERSION", help="Version of CANN that is reported."),
)


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what is emulated; ``settings_of`` reads them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def settings_of(soc: str | None, device_count: int | None, hbm_gib: float | None, cann: str | None) -> Settings:
    """Settings from the options; what is not given comes from an outer launcher, else is the default.

    Raises:
        EmulatorError: an option, or what the outer launcher announced, cannot be emulated.
    """
    given: dict[str, Any] = {"soc": soc, "device_count": device_count, "cann": cann}
    if hbm_gib is not None:
        if not 1 <= hbm_gib * GIB < MAX_BYTES:  # nan is neither
            raise EmulatorError(f"--hbm-gib {hbm_gib} must be the memory of a card in GiB, such as 32 or 1.5")
        given["hbm_bytes"] = int(hbm_gib * GIB)
    base = environment.announced() or Settings()
    return base.but(**{name: value for name, value in given.items() if value is not None})


def run(command: Sequence[str], settings: Settings) -> NoReturn:
    """Replace this process by ``command``, with emulated cards.

    The libraries are built first, so that a failure is reported once and not by every child.

    Raises:
        EmulatorError: the emulated device cannot be provided here.
        OSError: the command cannot be started.
    """
    from qwen2_npu.emulator import cuda_build, libraries

    environment.refuse_beside_cann()
    cuda_build.refuse_untried()
    libraries.build()
    child = dict(os.environ)
    environment.announce(settings, child)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], list(command), child)


def run_or_explain(command: Sequence[str], settings: Callable[[], Settings]) -> NoReturn:
    """``run``, with one line and an exit status for what goes wrong before the program starts."""
    try:
        run(command, settings())
    except EmulatorError as error:
        status, message = 2, str(error)
    except FileNotFoundError:
        status, message = NOT_FOUND, f"{command[0]}: no such program"
    except OSError as error:
        status, message = NOT_EXECUTABLE, f"{command[0]} cannot be run: {error.strerror}"
    click.echo(f"error: {message}", err=True)
    sys.exit(status)


def python_command(arguments: Sequence[str]) -> list[str]:
    """This interpreter with the options it was started with, running ``arguments``.

    Raises:
        EmulatorError: those options keep Python from reading its environment.
    """
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise EmulatorError("python -E, -I and -S keep emulated cards from child processes: start Python without them")
    import subprocess

    options: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *options, *arguments]
