"""The run in a few lines of Markdown, for a pull request or GITHUB_STEP_SUMMARY: it names every row that failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwen2_npu.conformance.report.changes import Change, changes
from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.history import Run
from qwen2_npu.conformance.report.page import bisections, verdict
from qwen2_npu.conformance.report.results import Results

LONGEST = 300


def markdown(results: Results, history: Sequence[Run], problems: Sequence[str] = ()) -> str:
    """The verdict, what changed, what failed, and how much was not run."""
    this = Run.of(results)
    found = changes(results.claims, this, history)
    return "\n".join(_lines(results, this, found, problems)) + "\n"


def _lines(results: Results, this: Run, found: Sequence[Change], problems: Sequence[str]) -> Iterator[str]:
    yield f"## {verdict(results, found, problems).text}"
    yield ""
    verified = results.provenance.verified or "nothing says what this was verified on"
    yield (
        f"Commit `{this.commit}`, {verified}. " + ", ".join(f"{n} {s}" for s, n in results.counts().items() if n) + "."
    )
    for problem in [*results.problems, *problems]:
        yield f"- ✗ {_cell(problem)}"
    if found:
        yield ""
        yield "| what changed | claim | by how much | last good | bad since | verified on |"
        yield "|---|---|---|---|---|---|"
    for change in found:
        good, bad = change.last_good, change.first_bad or this
        yield (
            f"| {change.kind} | {_cell(change.claim.title)} (`{change.claim.id}`) | {_cell(change.amount) or '–'} "
            f"| {f'`{good.commit}` {good.date}' if good else 'none'} | {f'`{bad.commit}` {bad.date}' if good else '–'} "
            f"| {change.claim.where} |"
        )
    for start, run, _ in bisections(found, this):
        if start.startswith("git "):
            yield f"\n`{start}`" + (f" and `{run}`" if run else "")
    failed = [claim for claim in results.claims if claim.status is Status.FAIL]
    if failed:
        yield ""
        yield "### Failed"
    for claim in failed:
        yield f"- **{_cell(claim.title)}** (`{claim.id}`): {_cell(claim.message)[:LONGEST]}"


def _cell(text: str) -> str:
    """One line that breaks no table."""
    return " ".join(text.replace("|", "\\|").split())
