"""Commands that a launcher starts once per card: the first rank prints and writes, all of them compute."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from qwen2_npu.cli import options
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel import launch

IN_ONE_PROCESS = ("baselines", "report", "nightly", "doctor", "merge-qkv", "quantize")
"""Commands that a launcher has nothing to do with."""

_met = False


def prepare(command: str | None) -> None:
    """Before a command: ranks but the first print nothing to stdout.

    Raises:
        UnsupportedError: what the launcher says makes no sense.
        click.UsageError: the command does not run in several processes.
    """
    global _met
    _met = False
    found = launch.launched()
    if found is None or found.world_size == 1:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no C++ stack traces where a rank is gone
    if found.rank:
        options.drop_output()
    if command in IN_ONE_PROCESS:
        raise click.UsageError(f"{command} runs in one process: start it without {found.world_size} ranks")


def first() -> bool:
    """Whether this process is the one that writes files."""
    found = launch.launched()
    return found is None or found.rank == 0


def let_the_first_speak() -> None:
    """Before an error is printed: what goes wrong before the ranks meet goes wrong in all of them.

    The others wait until the launcher ends them; an error of their own is printed a little later.
    """
    with contextlib.suppress(UnsupportedError):  # that is what is said
        if not _met and not first():
            time.sleep(launch.LINGER)


def in_ranks(function: Callable[..., None]) -> Callable[..., None]:
    """Run a command, which has a ``device`` among its parameters, inside of the group that the launcher started.

    It gets the rank's own device. Every rank must have been given the same options, find the same checkpoint in the
    folder ``model_path``, and end with the same status.
    """

    @functools.wraps(function)
    def inside(device: str | None, **given: Any) -> None:
        global _met
        found = launch.launched()
        if found is None or found.world_size == 1:
            return function(device=device, **given)
        options.import_first("torch")
        from qwen2_npu.parallel.agreement import agree, fingerprint

        status: Any = 0
        said: dict[str, str] = {}
        _met = True
        with launch.joined(options.device_name(device), given_as=f"--device {device}") as group:
            agree({f"--{name.replace('_', '-')}": _plain(value) for name, value in {"device": device, **given}.items()})
            if (folder := given.get("model_path")) is not None:
                with contextlib.suppress(OSError):  # the command says what is wrong with the folder
                    said = fingerprint(folder)
                agree(said, way_out=f"{folder}: put the same checkpoint on every node")
            try:
                function(device=str(group.device), **given)
            except SystemExit as end:
                status = end.code or 0
            agree({"exit status": status}, way_out="the ranks computed different results; please report it")
        sys.exit(status if group.rank == 0 else 0)  # the launcher ends the others for a status that is not 0

    return inside


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
