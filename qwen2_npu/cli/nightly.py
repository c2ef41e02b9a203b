"""``qwen2-npu nightly``: doctor, accuracy, graphs, latency and the report, on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from qwen2_npu.cli import options


@click.command("nightly")
@options.results_option("Where everything goes; what an earlier run made there is removed, its history is not.")
@options.history_option()
@click.option("--quick", is_flag=True, help="The fast lane of every suite: minutes, for pull requests.")
@click.option(
    "--append/--no-append",
    default=None,
    help="Add the run to the history.  [default: yes, but not with --quick]",
)
@options.device_option()
@options.model_path_option(help="Checkpoint for verify, accuracy and latency.  [default: tiny, and random weights]")
@click.option(
    "--gate-rows", metavar="PATTERN,…", default="*", show_default=True, help="Latency rows to judge, on a real NPU."
)
@click.option("--workers", type=click.IntRange(0, 1024), default=0, help="pytest processes where no time is measured.")
@click.option(
    "--minutes",
    type=options.FiniteFloat("a positive number of minutes, at most 525600", min=0, min_open=True, max=525_600),
    default=240.0,
    show_default=True,
    help="A stage may take.",
)
@click.option("--machine", type=click.Path(path_type=Path), default=None, hidden=True)
def command(
    results: Path,
    history: Path | None,
    quick: bool,
    append: bool | None,
    device: str | None,
    model_path: Path | None,
    gate_rows: str,
    workers: int,
    minutes: float,
    machine: Path | None,
) -> None:
    """Run every suite, and make the report whatever happens.

    On a real NPU the latency suite runs with --gate. Exit status: 0 everything passed, 1 anything failed, regressed, or
    is no longer run; the page (index.html) and its summary (summary.md) are made in every case. SIGINT (Ctrl-C),
    SIGTERM and SIGHUP end the running stage with all its processes, and the status is 128 and the signal's number; a
    second one ends at once. In a GitHub workflow the summary is shown with the job. docs/nightly.md says how to set up
    a machine and what to do when a row fails.
    """
    if machine is not None:
        _describe(machine, device)
        return
    from qwen2_npu.conformance.report import nightly
    from qwen2_npu.conformance.report.inputs import PAGE, SUMMARY

    results = Path(os.path.realpath(results))  # stages run in the checkout's root
    append = not quick if append is None else append
    _check(nightly.ROOT, (history or results / "history") if append else None)
    asked = nightly.NightlyOptions(
        results, device, model_path and model_path.resolve(), quick, gate_rows, workers, minutes
    )
    report = [*nightly.CLI, "report", "--check", "--results", str(results), "--summary", str(results / SUMMARY)]
    report += ["--history", str(history.resolve())] if history else []
    report += ["--append"] if append else []
    made = 1

    def finish() -> None:
        nonlocal made
        made = _report(report)
        if not (results / PAGE).exists():
            _say(f"error: {results / PAGE} was not made, for the reason above")
        _show_in_workflow(results / SUMMARY)

    with asked.stop.listening():
        stages = nightly.run(asked, _say, finish=finish)
    failed = [stage.name for stage in stages if stage.status != 0]
    _say(f"failed: {', '.join(failed)}" if failed else "every stage passed")
    _say(f"Page: {results / PAGE}")
    if asked.stop.number is not None:
        _say(f"error: {asked.stop.reason}")
        sys.exit(asked.stop.status)
    sys.exit(1 if failed or made else 0)


def _say(line: str) -> None:
    """Print, where anybody listens: a terminal that is gone, or a full disk below the output, changes no verdict."""
    try:
        with suppress(ValueError):  # closed, or in an encoding without these characters
            click.echo(line)
    except OSError:
        options.drop_output()


def _report(command: Sequence[str]) -> int:
    """Make the page in a process of its own. A first signal lets it go on; what ends this process ends it, too."""
    from qwen2_npu.conformance.children import Child

    child = Child(command)
    for line in child.output:
        _say(line.rstrip())
    return child.wait()


def _check(root: Path, history: Path | None = None) -> None:
    """What would spoil the end of a long run is found at its start.

    Args:
        history: the folder that the run will be added to.

    Raises:
        ValueError: no checkout, or nothing to make the page with.
        OSError: the history cannot be written.
    """
    from importlib.util import find_spec

    from qwen2_npu.conformance.files import check_folder
    from qwen2_npu.conformance.report.charts.canvas import HOW_TO_INSTALL

    if not (root / "tests").is_dir():
        raise ValueError(
            f"{root} has no folder tests: nightly runs in a checkout (git clone, pip install -e '.[test]')"
        )
    if any(find_spec(name) is None for name in ("matplotlib", "jinja2", "scipy")):
        raise ValueError(HOW_TO_INSTALL)
    if history is not None:
        check_folder(history)


def _describe(path: Path, device: str | None) -> None:
    """Commit, device and fingerprint, as JSON: a stage of its own process, so that no NPU stays held."""
    from qwen2_npu.conformance.files import write_json
    from qwen2_npu.conformance.machine.provenance import Provenance

    provenance = Provenance.of_device(options.check_device(device))
    write_json(path, provenance.to_json())
    click.echo(f"{provenance.verified}, fingerprint {provenance.fingerprint.name}, commit {provenance.commit}")


def _show_in_workflow(summary: Path) -> None:
    """GitHub shows what a step appends to this file with the job."""
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if not target or not summary.exists():
        return
    try:
        with open(target, "a", encoding="utf-8") as file:
            file.write(summary.read_text(encoding="utf-8"))
    except OSError as error:
        _say(f"error: {target} (GITHUB_STEP_SUMMARY) cannot be written: {error.strerror or error}")
