"""``qwen2-npu bench``: measured latency of prefill and decode, beside the documented numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2_npu.cli import interrupts, options, ranks
from qwen2_npu.optimizations import EXPERTS, LADDER, ORIGINAL, QUANTIZED
from qwen2_npu.parallel import launch

if TYPE_CHECKING:
    from rich.console import Console

    from qwen2_npu.conformance.machine.provenance import Provenance
    from qwen2_npu.conformance.perf.bench import BenchCase, BenchResult, Setup
    from qwen2_npu.conformance.perf.builds import Weights


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers, such as 1,4,8") from None
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r}: every batch is at least 1")
    return numbers


def _threads(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """Refuse more threads than cores: they only take turns, and very many cannot be made at all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if value is not None and value > cores:
        raise click.BadParameter(f"{value} threads: this process may use {cores} cores; give 1 to {cores}")
    return value


def _steps(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else options.names_of(value, (ORIGINAL, *LADDER, *EXPERTS, *QUANTIZED))


SIZES_HERE = "0.5B, 1.5B, 7B, 72B or 57B-A14B"


@click.command("bench")
@options.model_path_option(help="Hugging Face checkpoint folder; or --random-weights.")
@options.assume_tp_option()
@click.option(
    "--random-weights", metavar="SIZE", help=f"{SIZES_HERE}: the real shape, made on the device in the step's bits."
)
@click.option("--batch", "batches", callback=_numbers, default="1,4", show_default=True, metavar="N,…")
@click.option("--input-len", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of the prompt.")
@click.option("--output-len", type=click.IntRange(2), default=1024, show_default=True, help="New tokens per row.")
@click.option(
    "--steps",
    callback=_steps,
    metavar="STEP,…",
    help=f"{ORIGINAL} is the stock model; each other includes the steps before it: {', '.join(LADDER)}; {EXPERTS[0]} "
    f"of a mixture of experts, {' and '.join(QUANTIZED)} of 8-bit weights.  [default: {ORIGINAL}, which 8-bit weights "
    "do not have, and the model's last]",
)
@options.mode_option()
@options.device_option()
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--threads", type=click.IntRange(1), callback=_threads, help="CPU threads.  [default: torch's own]")
@click.option("--breakdown", is_flag=True, help="Also where the time goes: profile of a decode step, cost model.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results here.")
@ranks.in_ranks
def command(
    model_path: Path | None,
    assume_tp: int | None,
    random_weights: str | None,
    batches: tuple[int, ...],
    input_len: int,
    output_len: int,
    steps: tuple[str, ...] | None,
    mode: str,
    device: str | None,
    dtype: str,
    threads: int | None,
    breakdown: bool,
    json_path: Path | None,
) -> None:
    """Measure prefill and decode: one warm-up generate, one that is timed, no end of sequence.

    The documented numbers beside the measured ones are the guide's, of an Atlas 800I A2; only there do they compare.
    """
    from qwen2_npu.conformance.sizes import SIZES

    if assume_tp is not None and model_path is None:
        raise click.UsageError("--assume-tp needs --model-path DIR")
    if (model_path is None) == (random_weights is None):
        raise click.UsageError("give one of --model-path DIR and --random-weights SIZE")
    if random_weights is not None and random_weights not in [size.name for size in SIZES.values() if size.shards == 1]:
        raise click.UsageError(f"--random-weights {random_weights}: there are {SIZES_HERE.replace(' or ', ' and ')}")
    json_path = json_path if ranks.first() else None
    options.import_first("qwen2_npu.conformance.perf.bench")
    target = options.check_device(device)

    import torch
    from rich.console import Console

    options.quiet_transformers()
    from qwen2_npu.conformance.files import check_writable
    from qwen2_npu.conformance.perf import bench
    from qwen2_npu.conformance.perf.breakdown import WARM_UP
    from qwen2_npu.conformance.perf.builds import Weights

    if threads is not None:
        torch.set_num_threads(threads)
    weights = Weights.of(str(random_weights), model_path, assume_tp)
    if json_path is not None:
        check_writable(json_path)
    ladder = weights.ladder
    steps = steps or weights.usual
    if missing := [step for step in steps if step not in ladder]:
        raise click.UsageError(f"--steps {', '.join(missing)}: {_lacking(missing[0], weights)}")
    todo = bench.cases(steps, batches)
    group = launch.current()
    cards = 1 if group is None else group.world_size
    setup = bench.Setup(weights, mode, target, getattr(torch, dtype), input_len, output_len, cards)
    bench.check(replace(setup, output_tokens=max(output_len, WARM_UP + 2)) if breakdown else setup, todo)
    console = Console()
    _measure(setup, todo, json_path, console)
    if breakdown:
        _show_breakdown(setup, todo[-1], console)


def _lacking(step: str, weights: Weights) -> str:
    """Why that model does not have a step."""
    if step == ORIGINAL:
        return f"the weights of {weights.size.name} are 8-bit integers; measure the checkpoint that they were made of"
    if step not in QUANTIZED:
        return f"{weights.size.name} is no mixture of experts"
    return weights.size.no_8_bits or (
        f"the weights of {weights.size.name} are not made for that; write some with qwen2-npu quantize --scheme {step}"
    )


def _measure(setup: Setup, todo: Sequence[BenchCase], json_path: Path | None, console: Console) -> None:
    """All cases; what was measured is shown, and written, even where one of them fails."""
    import torch

    from qwen2_npu.conformance.machine.comparable import card_of
    from qwen2_npu.conformance.machine.provenance import Provenance
    from qwen2_npu.conformance.perf import bench

    made_by = Provenance.of_device(setup.device)
    card = None if _is_emulated(setup.device) else card_of(made_by.fingerprint)[0]
    results: list[BenchResult] = []
    try:
        with options.progress(console, "building the model") as progress, torch.no_grad():
            for result in bench.run(setup, todo, card=card, progress=progress):
                interrupts.check()
                results.append(result)
                if json_path is not None:
                    _write(json_path, results, made_by)
    finally:  # what was measured before a failure stays
        if results:
            show(results, console, setup.device)
            if json_path is not None:
                console.print(f"Results: {json_path}", highlight=False)
        if len(results) < len(todo):
            case = todo[len(results)]
            console.print(
                f"! Stopped at {case.step}, batch {case.batch}: {len(results)} of {len(todo)} cases were measured.",
                style="yellow", highlight=False,
            )  # fmt: skip


def _is_emulated(device: str) -> bool:
    from qwen2_npu import emulator

    return device.startswith("npu") and emulator.is_active()


def _write(path: Path, results: list[BenchResult], made_by: Provenance) -> None:
    from qwen2_npu.conformance.files import write_json

    results_json = [result.to_json() for result in results]
    write_json(path, {"schema": 2, "provenance": made_by.to_json(), "results": results_json})


NOTHING = "–"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def _ms(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f} ms"


COLUMNS: dict[str, Callable[[BenchResult], str]] = {
    "step": lambda r: r.step,
    "batch": lambda r: str(r.batch),
    "prefill\nms": lambda r: f"{r.prefill_ms:.1f}",
    "decode\nms": lambda r: f"{r.decode.mean:.2f}",
    "median": lambda r: f"{r.decode.median:.2f}",
    "p99": lambda r: f"{r.decode.p99:.2f}",
    "tok/s": lambda r: f"{r.tokens_per_second:.1f}",
    "memory\nroof": lambda r: _share(r.decode_memory_share),
    "compute\nroof": lambda r: _share(r.prefill_compute_share),
    "peak\nGB": lambda r: NOTHING if r.peak_bytes is None else f"{r.peak_bytes / 1e9:.2f}",
    "guide's\nprefill": lambda r: _ms(r.documented_prefill_ms),
    "guide's\ndecode": lambda r: _ms(r.documented_decode_ms),
}
"""Heading -> a result's cell. Roofs: decode of the memory's, prefill of the arithmetic's."""


def _on(cards: int) -> str:
    return f" on {cards} cards" if cards > 1 else ""


def show(results: list[BenchResult], console: Any, device: str) -> None:
    """The table, and what it stands for."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from qwen2_npu.conformance.machine.verified import Verified
    from qwen2_npu.conformance.perf import documented
    from qwen2_npu.conformance.perf.rows import weights_of

    first = results[0]
    weights = weights_of(first.weights, first.dtype, [result.step for result in results])
    table = Table(
        title=f"{first.model}{_on(first.cards)}, {weights} · {first.dtype} · {first.mode} · "
        f"{first.input_tokens} tokens + {first.decode_steps} steps",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown = {heading: [value(result) for result in results] for heading, value in COLUMNS.items()}
    # A device without a roofline has no column for it.
    shown = {heading: cells for heading, cells in shown.items() if any(cell != NOTHING for cell in cells)}
    for heading in shown:
        table.add_column(heading, justify="left" if heading == "step" else "right", no_wrap=True)
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    console.print(f"Measured on {device}: {Verified.on(device)}.", highlight=False)
    if first.cards > 1:
        console.print(f"Every step is that of the slowest of {first.cards} ranks.", highlight=False)
    if _is_emulated(device):
        console.print("These are the emulator's times and say nothing about an NPU.", highlight=False)
    if any(r.documented_prefill_ms is not None or r.documented_decode_ms is not None for r in results):
        console.print("Documented: the guide's, on an Atlas 800I A2. Only there do they compare.", highlight=False)
    for reason, of in cases_of(results, lambda r: r.not_documented).items():
        console.print(f"{of}: beside no documented number: {reason}.", highlight=False)
    if not documented.is_here():
        console.print("Documented numbers are in a checkout alone, not in an installed wheel.", highlight=False)
    for problem, of in cases_of(results, lambda r: (*r.faults, *r.warnings)).items():
        console.print(f"! {of}: {problem}", style="yellow", markup=False, highlight=False)


def cases_of(results: list[BenchResult], texts: Callable[[BenchResult], tuple[str, ...]]) -> dict[str, str]:
    """What is said of results -> the cases that it is said of: ``original, batch 1, 4; swiglu, batch 4``."""
    found: dict[str, dict[str, dict[int, None]]] = {}
    for result in results:
        for text in texts(result):
            found.setdefault(text, {}).setdefault(result.step, {})[result.batch] = None
    return {
        text: "; ".join(f"{step}, batch {', '.join(map(str, batches))}" for step, batches in steps.items())
        for text, steps in found.items()
    }


def _show_breakdown(setup: Setup, case: BenchCase, console: Any) -> None:
    from rich.table import Table

    from qwen2_npu.conformance.perf import breakdown

    measured = breakdown.profile(setup, case)
    table = Table(
        title=f"Measured on {setup.device}, {measured.time}: a decode step of {case.step}, batch {case.batch}, "
        f"after {setup.input_tokens + breakdown.WARM_UP} tokens"
    )
    for heading in ("operator", "calls", "ms", "share"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for line in measured.lines:
        table.add_row(line.operator, str(line.calls), f"{line.ms:.2f}", f"{line.share:.0%}")
    console.print(table)
    predicted = breakdown.predicted(setup.part, case.step, case.batch)
    if not predicted:
        console.print("No committed graph of this size, step and batch: no prediction.", highlight=False)
        return
    table = Table(
        title="Predicted by the cost model for an Ascend910B4, not measured: a decode step in graph mode of "
        f"{case.step}, batch {case.batch}, after {breakdown.PREDICTED_CONTEXT} tokens"
    )
    for heading in ("GE operator", "launches", "ms", "bound by"):
        table.add_column(heading, justify="left" if heading in ("GE operator", "bound by") else "right")
    for part, ms in predicted:
        table.add_row(part.operator, str(part.launches), ms, part.bound)
    console.print(table)
