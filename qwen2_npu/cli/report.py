"""``qwen2-npu report``: one HTML page from the files of a run and the history of runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qwen2_npu.cli import options

MARK, HEAD = "<title>qwen2-npu: ", 4096
"""What tells a page of this command from others, and in how many of its first bytes."""


@click.command("report")
@options.results_option("Folder of verify*.json, JUnit files (*.xml), benchmark*.json, bench.json and run.json.")
@options.history_option()
@click.option("--append", is_flag=True, help="Add this run to the history once the page is made.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE",
    help="[default: index.html, in --results]",
)  # fmt: skip
@click.option(
    "--summary", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE",
    help="Also write the verdict and what failed as Markdown.",
)  # fmt: skip
@click.option(
    "--check",
    is_flag=True,
    help="Exit with 1 if anything failed, regressed or is no longer run, or if nothing passed.",
)
def command(
    results: Path, history: Path | None, append: bool, output: Path | None, summary: Path | None, check: bool
) -> None:
    """Make one self-contained page: what regressed, by how much, since which commit, and all other results.

    \b
    A run's files come from
        qwen2-npu verify --json report/verify.json
        pytest tests/accuracy --junitxml=report/accuracy.xml
        pytest tests/graph --junitxml=report/graph.xml
        pytest tests/perf --junitxml=report/perf.xml --benchmark-json=report/benchmark.json
        qwen2-npu bench --json report/bench.json
    or, all but the last, from `qwen2-npu nightly`. What is missing is shown as "not run". Without --check the exit
    status is 0 if the page was made, whatever it shows.
    """
    from qwen2_npu.conformance.files import check_writable, write_text
    from qwen2_npu.conformance.report.changes import Kind, changes
    from qwen2_npu.conformance.report.history import Run, load
    from qwen2_npu.conformance.report.history import append as remember
    from qwen2_npu.conformance.report.inputs import PAGE
    from qwen2_npu.conformance.report.own_files import rewritten
    from qwen2_npu.conformance.report.page import render, verdict
    from qwen2_npu.conformance.report.results import Results
    from qwen2_npu.conformance.report.summary import markdown

    target, found = output or results / PAGE, Results.of(results)
    missing = not results.exists()
    for path in (target, summary):
        if path is not None:
            check_writable(path)
    if output is None and not _is_page(target):
        raise ValueError(f"{target} was not made by this command and would be lost: name a file with --output")
    runs, problems = load(history or results / "history")
    write_text(target, render(found, runs, problems))
    if summary is not None:
        write_text(summary, markdown(found, runs, problems))
    changed = changes(found.claims, Run.of(found), runs)
    rewritten(target)
    if summary is not None:
        rewritten(summary)
    said = verdict(found, changed, problems)
    click.echo(f"{said.text}\nPage: {target}")
    if missing:
        click.echo(f"There was no folder {results}: name the folder of the run's files with --results.", err=True)
    if append:
        click.echo(f"History: {remember(history or results / 'history', found)}")
    if check and (not found.passed or said.style == "fail" or any(change.kind is Kind.LOST for change in changed)):
        sys.exit(1)


def _is_page(path: Path) -> bool:
    """Whether this command made the file, or there is none."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        return MARK.encode() in file.read(HEAD)
