"""Options that several commands share, and what they mean."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2_npu import emulator
from qwen2_npu.cli import interrupts
from qwen2_npu.optimizations import EXPERTS, LADDER, MODES, QUANTIZED
from qwen2_npu.parallel import launch

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = ("auto", "float32", "bfloat16", "float16")


def names_of(value: str, known: Sequence[str]) -> tuple[str, ...]:
    """``a,b`` -> names, each one of ``known``.

    Raises:
        click.BadParameter: an unknown name, or none.
    """
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise click.BadParameter(f"no step {', '.join(unknown) or repr(value)}; the steps are {', '.join(known)}")
    return names


def parse_steps(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """``a,b`` -> steps of the ladder, of experts or of 8-bit weights.

    Raises:
        click.BadParameter: an unknown step.
    """
    return None if value is None else names_of(value, (*LADDER, *EXPERTS, *QUANTIZED))


class FiniteFloat(click.FloatRange):
    """A number between limits, and a number it is: click's own type lets "nan" through, and "inf" where one is open.

    Args:
        what: what it must be, for the message: "a positive number of minutes".
        limits: as :class:`click.FloatRange` takes them.
    """

    name = "number"

    def __init__(self, what: str, **limits: Any) -> None:
        super().__init__(**limits)
        self.what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``value`` as a number.

        Raises:
            click.BadParameter: it is none, not finite, or out of the limits.
        """
        try:
            number = float(super().convert(value, param, ctx))
        except click.BadParameter:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value}: must be {self.what}", param, ctx)
        return number


EMULATED = "emulated"
"""Name, as a device, of the emulated NPU. torch calls it npu."""


def default_device() -> str:
    """``npu`` where torch_npu finds one, real or emulated, else ``cpu``."""
    if importlib.util.find_spec("torch_npu") is None:
        return "cpu"
    if emulator.activate_where_needed():
        return "npu"  # emulated cards are always there: no need to import torch to ask
    import torch

    importlib.import_module("torch_npu")
    return "npu" if hasattr(torch, "npu") and torch.npu.is_available() else "cpu"


def check_device(device: str | None) -> str:
    """``device`` as torch names it, or the default one.

    Raises:
        ValueError: torch has no such device, with the ones it has.
    """
    if device is None:
        return default_device()
    name = device_name(device)
    from qwen2_npu.devices import usable

    return str(usable(name, given_as=f"--device {device}"))


def device_name(device: str | None) -> str:
    """``device`` as torch would name it, or the default one. Nothing is allocated on it.

    Raises:
        ValueError: it is the emulated one, and there is none.
    """
    if device is None:
        return default_device()
    # transformers imports torch_npu wherever it is installed: without an NPU even "cpu" needs the emulator then.
    active = emulator.activate_where_needed()
    given_as = f"--device {device}"
    kind, colon, number = device.partition(":")
    if kind == EMULATED:
        if not active:
            installed = importlib.util.find_spec("torch_npu") is not None
            raise ValueError(
                f"{given_as}: "
                + (
                    "a real NPU is here; use npu"
                    if installed
                    else "torch_npu is missing; pip install torch_npu==2.13.0"
                )
            )
        return f"npu{colon}{number}"
    return device


def import_first(*modules: str) -> None:
    """Import what a command computes with, and torch and transformers with it, before it does anything else.

    An interrupt ends the process at once then: nothing is begun yet that has to be tidied up.
    """
    with interrupts.ending_at_once():
        for name in modules:
            importlib.import_module(name)


@contextlib.contextmanager
def progress(console: Console, label: str) -> Iterator[Callable[[str, int, int], None]]:
    """What comes next, parts done, parts in all: a callback that shows them while a command works.

    On a terminal a bar. Elsewhere (CI, nohup, a pipe) a line on stderr for each part as it ends, of the first rank.
    The callback does not return where an interrupt came.

    Args:
        label: shown until the first call.
    """
    if not console.is_terminal:
        found = launch.launched()
        lines = PlainLines(click.echo if found is None or found.rank == 0 else lambda line, err: None)

        def say(label: str, done: int, total: int) -> None:
            interrupts.check()
            lines.move(label, done, total)

        yield say
        lines.end()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def move(label: str, done: int, total: int) -> None:
            interrupts.check()
            bar.update(task, description=label, completed=done, total=total)

        yield move


class PlainLines:
    """Progress without a terminal: a line for each part as it ends, with its seconds.

    A part begins where label and number of parts done change together. What is inside a part (a layer, a tensor) has a
    line of its own only where none was written for :data:`QUIET` seconds.

    Args:
        echo: ``click.echo``.
        clock: seconds that only grow.
    """

    QUIET = 60.0

    def __init__(self, echo: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self.echo, self.clock = echo, clock
        self.part, self.inside, self.done, self.total = "", "", -1, 0
        self.began = self.said = clock()

    def move(self, label: str, done: int, total: int) -> None:
        """The callback of :func:`progress`."""
        if label != self.inside and done != self.done:
            self._say(self.part, done, total, self.began)
            self.part, self.began = "" if done == total else label, self.clock()
        elif label != self.inside and self.clock() - self.said >= self.QUIET:
            self._say(self.inside, done, total, self.began)
        self.inside, self.done, self.total = label, done, total

    def end(self) -> None:
        """The last part ended."""
        self._say(self.part, self.total, self.total, self.began)

    def _say(self, what: str, done: int, total: int, since: float) -> None:
        if not what:
            return
        self.said = self.clock()
        with contextlib.suppress(OSError, ValueError):  # nobody listens: that changes no result
            self.echo(f"{what} ({done}/{total}): {self.said - since:.1f} s", err=True)


def drop_output() -> None:
    """Nobody reads what is printed: what is left and what comes goes nowhere."""
    with contextlib.suppress(OSError, AttributeError):  # the stream of a test has no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def quiet_transformers() -> None:
    """No progress bars and no advice of its own between the lines of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_path_option(**extra: Any) -> Any:
    return click.option("--model-path", type=click.Path(path_type=Path), metavar="DIR", **extra)


def assume_tp_option() -> Any:
    return click.option(
        "--assume-tp",
        type=click.IntRange(1),
        metavar="N",
        help="For a folder that the upstream guide's script merged: its tp_size, which the folder does not record.",
    )


def device_option() -> Any:
    return click.option(
        "--device",
        metavar="DEVICE",
        help="cpu, npu, emulated, cuda, …  [default: npu (emulated where torch_npu finds none), else cpu]",
    )


def dtype_option() -> Any:
    return click.option(
        "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="auto: as stored."
    )


def mode_option() -> Any:
    return click.option(
        "--mode",
        type=click.Choice(MODES),
        default="eager",
        show_default=True,
        help="How the model is compiled: torchair and npugraph_ex for NPUs, inductor for CPU and CUDA.",
    )


def results_option(purpose: str) -> Any:
    """``--results``: the folder of one run's files."""
    return click.option(
        "--results",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("report"),
        show_default=True,
        metavar="DIR",
        help=purpose,
    )


def history_option() -> Any:
    """``--history``: the folder of earlier runs."""
    return click.option(
        "--history",
        type=click.Path(path_type=Path, file_okay=False),
        default=None,
        metavar="DIR",
        help="Folder of earlier runs.  [default: history, in --results]",
    )
