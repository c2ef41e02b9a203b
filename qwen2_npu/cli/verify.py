"""``qwen2-npu verify``: the accuracy comparison of the whole ladder, shown and written down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen2_npu import emulator
from qwen2_npu.cli import interrupts, options, ranks
from qwen2_npu.optimizations import EXPERTS, LADDER, PARALLEL, QUANTIZED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qwen2_npu.conformance.accuracy.pair import GreedyText
    from qwen2_npu.conformance.accuracy.quantising_cost import QuantisingCost
    from qwen2_npu.conformance.accuracy.verify import StepResult, Verification


def _parse_steps(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else options.names_of(value, (*LADDER, *EXPERTS, *PARALLEL, *QUANTIZED))


@click.command("verify")
@options.model_path_option(help="Hugging Face checkpoint folder.  [default: the trained tiny one of this package]")
@options.assume_tp_option()
@options.device_option()
@options.dtype_option()
@click.option(
    "--steps",
    callback=_parse_steps,
    metavar="STEP,…",
    help=f"Rows to run; each includes the steps before it.  [default: {','.join(LADDER)}; of a mixture of "
    f"experts {','.join(EXPERTS)}, under a launcher with 2, 4 or 8 ranks {','.join(PARALLEL)}, and of 8-bit weights "
    f"the one of {', '.join(QUANTIZED)} that they are made for as well]",
)
@options.mode_option()
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Take the stock model and its float64 self layer by layer, or whole.  [default: layer by layer where the "
    "whole does not fit the free memory]",
)
@click.option(
    "--against",
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The checkpoint in floating point that --model-path was quantised from: show what the 8 bits cost, in all and "
    "by each module alone.",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), default=Path("report/verify.json"), show_default=True
)
@ranks.in_ranks
def command(
    model_path: Path | None,
    assume_tp: int | None,
    device: str | None,
    dtype: str,
    steps: tuple[str, ...] | None,
    mode: str,
    stream: bool | None,
    against: Path | None,
    json_path: Path,
) -> None:
    """Compare every step of the optimisation ladder with the stock transformers model, at every position.

    Both models see the same tokens (prefill, then the decode path with the stock model's tokens forced); a different
    best token is excused only where the stock model's own rounding, measured against float64, could have made it.
    Under a launcher of several ranks they share the optimised model; the stock model is on the first one alone.
    Exit status: 0 all passed, 1 a step failed, 2 nothing could be compared, 130 interrupted.
    """
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.out("starting", end="\r", highlight=False)
    options.import_first("qwen2_npu.conformance.accuracy.verify")
    if not ranks.first():
        from qwen2_npu.conformance.accuracy.verify import take_part

        options.quiet_transformers()
        passed = take_part(model_path, device=options.check_device(device), dtype=dtype, assume_tp=assume_tp)
        sys.exit(0 if passed else 1)
    with options.progress(console, "starting") as progress:
        options.quiet_transformers()
        from qwen2_npu.conformance.accuracy.verify import verify
        from qwen2_npu.conformance.files import check_writable, write_json
        from qwen2_npu.conformance.report.own_files import rewritten

        check_writable(json_path)
        result = verify(
            model_path,
            device=options.check_device(device),
            dtype=dtype,
            steps=steps,
            mode=mode,
            stream=stream,
            assume_tp=assume_tp,
            against=against,
            progress=progress,
        )
        interrupts.check()
        write_json(json_path, result.to_dict())  # first, whether or not somebody reads the rest
        rewritten(json_path)
    interrupts.check()
    show(result, console)
    console.print(f"Report: {json_path}", highlight=False)
    sys.exit(0 if result.passed else 1)


def show(result: Verification, console: Console) -> None:
    """Texts side by side, the table, and what it stands for."""
    if result.samples:
        console.print(_texts(result.samples), markup=False)
    console.print(_ladder(result))
    if any(row.experts for row in result.rows):
        console.print(_experts(result))
    if result.perplexity is not None:
        perplexity = result.perplexity
        console.print(
            f"Perplexity of {perplexity.tokens} held-out tokens: stock {perplexity.baseline:.4f}, optimised "
            f"{perplexity.optimised:.4f}",
            highlight=False,
        )
    if result.cost is not None:
        _cost(result.cost, console)
    if result.streamed:
        console.print(
            f"The stock model and its float64 self went layer by layer ({result.streamed}); decode was forced to the "
            "tokens that follow the prompts in the held-out text",
            highlight=False,
        )
    if result.ranks > 1:
        console.print(
            f"{result.ranks} ranks shared the optimised model; the stock model and its float64 self were on rank 0 "
            "alone",
            highlight=False,
        )
    if result.left_out:
        console.print(f"Left out: {result.left_out}", highlight=False)
    environment = result.environment
    console.print(
        f"Verified with {environment.verified} on {environment.device}: torch {environment.versions['torch']}, "
        f"transformers {environment.versions['transformers']}; noise measured against {result.reference_dtype}",
        highlight=False,
    )
    if emulator.is_active() and environment.device.startswith("npu"):
        console.print("Tokens/s are the emulator's own and say nothing about an NPU.", highlight=False)
    for failure in result.failures:
        console.print(f"FAIL {failure}", style="red", markup=False, highlight=False)
    console.print("passed" if result.passed else "FAILED", style="bold green" if result.passed else "bold red")


def _texts(samples: Sequence[GreedyText]) -> Table:
    from rich.table import Table

    table = Table(title="Greedy text", show_lines=True)
    for header in ("prompt", "stock", "optimised"):
        table.add_column(header, ratio=1, overflow="fold")
    for sample in samples:
        same = sample.baseline == sample.optimised
        table.add_row(sample.prompt, sample.baseline, "same" if same else f"{sample.optimised}\n[{sample.divergence}]")
    return table


COLUMNS: dict[str, Callable[[StepResult], str]] = {
    "positions": lambda row: str(row.positions),
    "same\ntop-1": lambda row: f"{row.agreement:.2%}",
    "near-\nties": lambda row: str(len(row.excused)),
    "max\nerror": lambda row: f"{row.max_logit_error:.2g}",
    "KL": lambda row: f"{row.kl:.0e}",
    "RMS\nratio": lambda row: f"{row.rms_ratio:.2f}",
    "tok/s": lambda row: f"{row.tokens_per_second:.0f}",
    "stock\ntok/s": lambda row: (
        "–" if row.baseline_tokens_per_second is None else f"{row.baseline_tokens_per_second:.0f}"
    ),
}
"""Heading -> a step's cell."""


def _ladder(result: Verification) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"Optimisation ladder, cumulative · {result.model} · {result.dtype} · {result.mode}",
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("step", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in result.rows:
        verdict = "[green]pass[/]" if row.passed else "[red]FAIL[/]"
        table.add_row(row.step, *(cell(row) for cell in COLUMNS.values()), verdict)
    return table


def _experts(result: Verification) -> Table:
    """Which experts each step would choose by itself, over all layers and positions."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="Experts that the routers would choose", box=SIMPLE_HEAD, padding=0)
    table.add_column("step", no_wrap=True)
    for heading in ("choices", "the stock model's", "near-ties", "positions left out"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(row.step, *(str(row.experts[key]) for key in ("choices", "agreements", "excused", "left_out")))
    return table


COSTLIEST = 8
"""Modules that are shown; the file has all."""


def _cost(cost: QuantisingCost, console: Console) -> None:
    """What 8 bits cost, in all and by module."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(
        f"{cost.scheme} against {cost.against}, both in float32, {cost.tokens} held-out tokens: perplexity "
        f"{cost.perplexity:.4f} → {cost.whole.perplexity:.4f}, KL {cost.whole.kl:.2e} (at most "
        f"{cost.whole.kl_max:.2e}), same top-1 {cost.whole.agreement:.2%}",
        highlight=False,
    )
    if cost.left_out:
        console.print(f"No module is shown alone: {cost.left_out}", highlight=False)
        return
    table = Table(title=f"The {COSTLIEST} costliest modules, each alone in 8 bits", box=SIMPLE_HEAD, padding=0)
    table.add_column("module", no_wrap=True)
    for heading in ("KL", "loss", "same top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, effect in cost.costliest(COSTLIEST):
        cells = f"{effect.kl:.1e}", f"{effect.loss:+.1e}", f"{effect.agreement:.2%}"
        table.add_row(name.removeprefix("model.layers."), *cells)
    console.print(table)
    kinds = ", ".join(f"{kind} {kl:.1e}" for kind, kl in cost.by_kind().items())
    console.print(f"KL alone, summed over the layers: {kinds}", highlight=False)
