"""``python -m qwen2_npu.emulator [options] script.py …``: a Python program on emulated cards."""

from __future__ import annotations

import sys
from typing import Any

import click

from qwen2_npu.emulator import launch
from qwen2_npu.emulator.settings import EmulatorError


@click.command(context_settings=launch.CONTEXT)
@launch.settings_options
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="SCRIPT|-m MODULE|-c CODE [ARG]…")
def main(arguments: tuple[str, ...], **options: Any) -> None:
    """Run a Python program, and every process it starts, as if on an Atlas 800I A2."""
    try:
        command = launch.python_command(arguments)
    except EmulatorError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    launch.run_or_explain(command, lambda: launch.settings_of(**options))


if __name__ == "__main__":
    main(prog_name="python -m qwen2_npu.emulator")
