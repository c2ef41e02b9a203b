"""The run in a few lines of Markdown, for a pull request or GITHUB_STEP_SUMMARY: it names every row that failed.

Names, messages and errors come from files and may hold anything: :func:`text` and :func:`code` let none of it act as
Markdown or HTML.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence

from qwen2_npu.conformance.report.changes import Change, changes
from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.history import Run
from qwen2_npu.conformance.report.page import bisections, verdict
from qwen2_npu.conformance.report.results import Results

LONGEST = 300
"""Characters of a message that are shown."""

_MARKUP = re.compile(r"[\\`*_{}\[\]|~!$]|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What Markdown would read as emphasis, code, a link, an image, math or the end of a table's cell."""

_NO_CODE = re.compile(r"[`\\|]")
"""What a code span in a table cannot hold: renderers differ in how they read it."""


def markdown(results: Results, history: Sequence[Run], problems: Sequence[str] = ()) -> str:
    """The verdict, what changed, what failed, and how much was not run."""
    this = Run.of(results)
    found = changes(results.claims, this, history)
    return "\n".join(_lines(results, this, found, problems)) + "\n"


def text(value: str, longest: int | None = None) -> str:
    """``value`` on one line, as Markdown that shows it as it is."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(_line(value)[:longest], quote=False))


def code(value: str) -> str:
    """``value`` on one line as a code span; as text where a code span cannot hold it."""
    line = _line(value)
    return text(line) if not line or _NO_CODE.search(line) else f"`{line}`"


def _line(value: str) -> str:
    """Without line breaks and without characters that a terminal or a browser would act on."""
    plain = "".join(" " if unicodedata.category(character) in ("Cc", "Cs") else character for character in value)
    return " ".join(plain.split())


def _lines(results: Results, this: Run, found: Sequence[Change], problems: Sequence[str]) -> Iterator[str]:
    yield f"## {text(verdict(results, found, problems).text)}"
    yield ""
    verified = results.provenance.verified.text or "no file of this run states the device"
    counts = ", ".join(f"{count} {status}" for status, count in results.counts().items() if count)
    yield f"Commit {code(this.commit)}, {text(verified)}. {counts}."
    yield ""
    for problem in [*results.problems, *problems]:
        yield f"- ✗ {text(problem)}"
    if found:
        yield ""
        yield "| what changed | check | by how much | last good | bad since | verified on |"
        yield "|---|---|---|---|---|---|"
    for change in found:
        good, bad = change.last_good, change.first_bad or this
        yield (
            f"| {change.kind} | {text(change.claim.title)} ({code(change.claim.id)}) | {text(change.amount) or '–'} "
            f"| {_run(good) if good else 'none'} | {_run(bad) if good else '–'} | {change.claim.where} |"
        )
    for start, run, _ in bisections(found, this):
        if start.startswith("git "):
            yield f"\n{code(start)}" + (f" and {code(run)}" if run else "")
    failed = [claim for claim in results.claims if claim.status is Status.FAIL]
    if failed:
        yield ""
        yield "### Failed"
        yield ""
    for claim in failed:
        yield f"- **{text(claim.title)}** ({code(claim.id)}): {text(claim.message, LONGEST)}"


def _run(run: Run) -> str:
    return f"{code(run.commit)} {text(run.date)}"
