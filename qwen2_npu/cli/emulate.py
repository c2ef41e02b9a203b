"""``qwen2-npu emulate``: any program on emulated cards, its child processes included."""

from __future__ import annotations

from typing import Any

import click

from qwen2_npu.emulator import launch


@click.command("emulate", context_settings=launch.CONTEXT)
@launch.settings_options
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="PROGRAM [ARG]…")
def command(arguments: tuple[str, ...], **options: Any) -> None:
    """Run PROGRAM, and every process it starts, as if on an Atlas 800I A2.

    The real torch_npu and torchair compute on the CPU, so no NPU and no CANN are needed, and the script needs no
    change. torchrun and deepspeed work as they are. Put -- before the program:

    \b
        qwen2-npu emulate -- python script.py --device npu
        qwen2-npu emulate --device-count 2 --hbm-gib 4 -- torchrun --nproc-per-node 2 train.py
    """
    launch.run_or_explain(arguments, lambda: launch.settings_of(**options))
