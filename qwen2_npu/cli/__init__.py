"""``qwen2-npu`` and its commands. Starting it imports no torch; the commands do, when run."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import click

from qwen2_npu import emulator

COMMANDS = {
    "verify": "Compare every optimisation with the stock model, token by token.",
    "generate": "Generate text with the optimised model.",
    "emulate": "Run any program on emulated NPUs: the real torch_npu, computing on the CPU.",
    "bench": "Measure prefill and decode latency, beside the documented numbers.",
    "baselines": "Show the documented latencies; write or check pytest-benchmark's file of them.",
    "report": "Make one HTML page of a run: what regressed, by how much, since which commit.",
    "nightly": "Run every suite on this machine, and make the report whatever happens.",
    "doctor": "Show versions and devices, what is missing, and how to get it.",
}
"""Command -> its line in the overview. Each lives in the module of its name."""

WITHOUT_TORCH = ("emulate", "report", "nightly", "doctor")
"""Commands that work where torch_npu cannot be loaded: that may be just what they have to say."""

BAD_INPUT = 2
"""Exit status for input that cannot be worked with; 1 is a comparison that failed."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"qwen2_npu.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, MemoryError, emulator.EmulatorError) as error:
            if ctx.params.get("traceback"):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
        except RuntimeError as error:
            if ctx.params.get("traceback") or not _is_out_of_memory(error):
                raise
            message = _out_of_memory(error)
        click.echo(f"error: {message}", err=True)
        sys.exit(BAD_INPUT)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of a device, or of the host: for the latter torch has no exception of its own."""
    torch = sys.modules.get("torch")
    return (torch is not None and isinstance(error, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _out_of_memory(error: RuntimeError) -> str:
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    what = f"{asked[1]} more could not be had" if asked else " ".join(str(error).split())
    return (
        f"out of memory: {what}; take a smaller batch, fewer tokens, a 16-bit dtype, or a machine with more "
        "(--traceback before the command shows where)"
    )


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qwen2-npu")
@click.option("--traceback", is_flag=True, help="Show where an error comes from, in place of one line.")
@click.pass_context
def main(ctx: click.Context, traceback: bool) -> None:
    """Qwen2 for Ascend NPUs, and the proof that it computes what the stock model computes."""
    if ctx.invoked_subcommand not in (*WITHOUT_TORCH, None):
        emulator.activate_where_needed()  # torch and transformers load torch_npu wherever it is installed
