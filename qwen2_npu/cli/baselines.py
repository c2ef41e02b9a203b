"""``qwen2-npu baselines``: the documented latencies, shown, written for pytest-benchmark, or checked."""

from __future__ import annotations

from pathlib import Path

import click

from qwen2_npu.conformance.perf import benchmark_json, documented


@click.command("baselines")
@click.option("--write", is_flag=True, help=f"Make {benchmark_json.FILE} from {documented.SOURCE}.")
@click.option("--check", is_flag=True, help="Only check that the two agree.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=documented.BASELINES, show_default=True, metavar="DIR"
)
def command(write: bool, check: bool, folder: Path) -> None:
    """Show the documented latencies, with the tables they come from.

    With --write, make from them the file that `pytest --benchmark-compare` and `pytest-benchmark compare` read; with
    --check, exit with 2 if that file does not agree.
    """
    numbers = documented.read(folder / documented.SOURCE)
    if write:
        click.echo(f"wrote {benchmark_json.write(numbers, folder)}: {len(numbers)} documented numbers")
    if check:
        benchmark_json.check(numbers, folder)
        click.echo(f"{folder / benchmark_json.FILE} agrees with {documented.SOURCE} in all {len(numbers)} numbers")
    if not write and not check:
        _show(numbers)


def _show(numbers: tuple[documented.Documented, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    conditions = numbers[0].conditions
    console = Console(width=max(Console().width, 106))
    for name in dict.fromkeys(number.row.table for number in numbers):
        rows = [number for number in numbers if number.row.table == name]
        columns = list(dict.fromkeys(f"{row.row.configuration.mode} {row.row.phase}" for row in rows))
        versions = ", ".join(f"{package} {version}" for package, version in rows[0].versions.items())
        table = Table(title=f"{name}: {rows[0].title} ({versions})", title_justify="left")
        for heading in ("", "step", "batch", *columns):
            numeric = heading in (*columns, "batch")
            table.add_column(heading, justify="right" if numeric else "left", no_wrap=not numeric)
        for label in dict.fromkeys(row.label for row in rows):
            line = [row for row in rows if row.label == label]
            what = line[0].row.configuration
            table.add_row(label, what.step, str(what.batch), *(f"{row.ms:.0f}" for row in line))
        console.print(table)
        for note in dict.fromkeys(row.note for row in rows if row.note):
            console.print(f"  {note}", highlight=False, markup=False)
    console.print(
        f"{len(numbers)} numbers, {conditions.unit}: {conditions.machine} (SKU {conditions.sku}), "
        f"{conditions.host} host, {conditions.dtype}, {conditions.input_tokens} tokens in, "
        f"{conditions.output_tokens} out, ± {conditions.rounding} {conditions.unit}",
        highlight=False,
    )
