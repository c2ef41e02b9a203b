"""``qwen2-npu`` and its commands. Starting it imports no torch; the commands do, when run."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from qwen2_npu import emulator
from qwen2_npu.cli import interrupts, options, ranks

COMMANDS = {
    "verify": "Compare every optimisation with the stock model, token by token.",
    "generate": "Generate text with the optimised model.",
    "merge-qkv": "Merge q, k and v of a checkpoint on disk, for one or several ranks; or undo it.",
    "quantize": "Write a checkpoint with 8-bit weights, which runs as w8a16 or w8a8.",
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

OWN_INTERRUPTS = ("nightly",)
"""Commands that catch an interrupt to end in good order, with a status of their own."""

BAD_INPUT = 2
"""Exit status for input that cannot be worked with; 1 is a comparison that failed."""

INTERRUPTED, CLOSED_PIPE = 130, 141
"""Exit statuses as a shell gives them to programs that SIGINT and SIGPIPE end."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"qwen2_npu.cli.{name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().main(*args, **extra)
        except SystemExit as end:
            sys.exit(_written(end.code))

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _closed_pipe():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with interrupts.watched(), _closed_pipe():
            try:
                result = self._invoke(ctx)
            except KeyboardInterrupt:
                pass
            except BaseException:
                if not interrupts.came() or ctx.invoked_subcommand in OWN_INTERRUPTS:
                    raise
            else:
                if not interrupts.came() or ctx.invoked_subcommand in OWN_INTERRUPTS:
                    return result
            click.echo("Aborted!", err=True)
            sys.exit(INTERRUPTED)

    def _invoke(self, ctx: click.Context) -> Any:
        """The command, with one line for what is wrong for a user."""
        try:
            return super().invoke(ctx)
        except click.ClickException:
            ranks.let_the_first_speak()
            raise
        except BrokenPipeError:
            raise
        except (ValueError, OSError, MemoryError, emulator.EmulatorError) as error:
            if ctx.params.get("traceback"):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
        except RuntimeError as error:
            if ctx.params.get("traceback") or not _is_out_of_memory(error):
                raise
            message = _out_of_memory(error)
        ranks.let_the_first_speak()
        interrupts.check()  # an import that was broken off fails in its own words
        click.echo(f"error: {message}", err=True)
        sys.exit(BAD_INPUT)


@contextlib.contextmanager
def _closed_pipe() -> Iterator[None]:
    """End quietly where the reader of the output is gone, as ``head`` is after its ten lines."""
    try:
        yield
    except BrokenPipeError:
        sys.exit(CLOSED_PIPE)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich's way to say so
            sys.exit(CLOSED_PIPE)
        raise


def _written(status: Any) -> Any:
    """``status``, after the output was written; what is left where that fails is dropped, not said again by Python."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        failed = CLOSED_PIPE
    except OSError as error:
        failed = BAD_INPUT
        if not status:
            click.echo(f"error: {error}", err=True)
    options.drop_output()
    return status or failed


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
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False, help="Given by launchers.")
@click.pass_context
def main(ctx: click.Context, traceback: bool) -> None:
    """Qwen2 for Ascend NPUs, and the proof that it computes what the stock model computes."""
    ranks.prepare(ctx.invoked_subcommand)
    if ctx.invoked_subcommand not in (*WITHOUT_TORCH, None):
        emulator.activate_where_needed()  # torch and transformers load torch_npu wherever it is installed
        if not emulator.is_active():
            from qwen2_npu.emulator import install

            install.keep_signal_handlers()
