"""The few lines that a workflow shows."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.machine.provenance import Provenance
from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.report.claims import Claim, Status, Value
from qwen2_npu.conformance.report.history import Entry, Run
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.report.results import Results
from qwen2_npu.conformance.report.summary import code, markdown, text
from tests.unit.conformance.report.synthetic import SLOW, CaseText, Night, commit_of, write_junit


def test_names_the_rows_the_amounts_and_the_commits(night) -> None:  # type: ignore[no-untyped-def]
    made = markdown(night.results, night.history)
    assert made.startswith("## 4 checks regressed")
    row = next(line for line in made.splitlines() if f"`latency/{SLOW}`" in line)
    for part in ("23.4 → 27.1 ms (+16 %)", commit_of(9)[:10], commit_of(10)[:10], "real NPU"):
        assert part in row
    assert f"`git bisect start {commit_of(10)[:12]} {commit_of(9)[:12]}` and `git bisect run " in made
    assert made.count(f"(`latency/{SLOW}`): slower") == 1


def test_a_message_cannot_break_the_table(tmp_path: Path) -> None:
    Night(0).write(tmp_path)
    case = CaseText("tests.perf.test_latency", f"test_latency[{SLOW}]", failure="a | b\nc")
    write_junit(tmp_path / "perf.xml", [case], Night(0).provenance)
    failed = [line for line in markdown(Results.of(tmp_path), []).splitlines() if line.startswith("- **")]
    assert any(line.endswith("a \\| b c") for line in failed)


def test_nothing_was_run(tmp_path: Path) -> None:
    assert markdown(Results.of(tmp_path), []).startswith("## Nothing was run")


# ---- hostile files --------------------------------------------------------------------------------------------------
MARKUP = st.text(st.sampled_from("<>&|`\\*_[](){}#!~-+.:/\n\r\t\x00\x1b\x85\u2028\u202e\ud800 ab1"), max_size=40)
EXAMPLES = (
    "<script>alert(1)</script>", "</td></table><img src=x onerror=alert(1)>", "[a](javascript:alert(1))",
    "![a](http://b)",
    "a | b \\| c \\\\| d", "`a` ``b`` `", "\n\n# a\n\n- b\n\n---\n", "http://evil.example www.evil.example",
    "&lt;b&gt;",
    "<http://evil.example>", "**a** __b__ ~~c~~ $d$", "[a]: http://b", "\\", "a\\", "<!-- ",
    "&#60;b>", "\x1b[31mred", "\ud800",
)  # fmt: skip
HOSTILE = st.one_of(st.sampled_from(EXAMPLES), MARKUP, st.text(max_size=30))
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(value: str) -> str:
    """What a reader should see of ``value``, whatever Unicode says of the characters in it."""
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in value).split())


def rendered(inline: Token) -> str:
    return "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))


def inlines(text: str) -> Iterator[Token]:
    return (token for token in PARSER.parse(text) if token.type == "inline")


def assert_shown(line: str, value: str, around: tuple[str, str] = ("", "")) -> None:
    """``line`` shows ``value``, and nothing in it is an element of its own."""
    (inline,) = inlines(line)
    kinds = {child.type for child in inline.children or ()}
    assert kinds <= {"text", "code_inline", "strong_open", "strong_close"}, line
    assert rendered(inline) == around[0] + shown(value) + around[1], line


@given(HOSTILE)
@settings(max_examples=300, deadline=None)
def test_text_and_code_show_any_string_as_it_is(value: str) -> None:
    assume(shown(value))
    for made in (text(value), code(value)):
        assert "\n" not in made
        assert made.startswith("`") or not re.search(r"(?<!\\)://|www\.", made, re.IGNORECASE), (
            "GitHub would make it a link"
        )
        assert_shown(f"- ✗ {made}", value, ("✗ ", ""))
        assert_shown(f"- **a** ({made}): b", value, ("a (", "): b"))
        cells = [rendered(cell) for cell in inlines(f"| a | b |\n|---|---|\n| x {made} | y |")]
        assert cells == ["a", "b", f"x {shown(value)}", "y"], made


NPU = Verified.read("npu (x)")


def hostile_run(strings: Sequence[str]) -> tuple[Results, list[Run], list[str]]:
    """A run and its history in which every text is one of ``strings``."""
    name = itertools.cycle(strings).__next__

    def provenance(day: int) -> Provenance:
        return Provenance(
            f"{day}{name()}",
            True,
            f"2026-10-{day:02d}{name()}",
            Verified.read(name()),
            Fingerprint.read({"affinity": name().encode("utf-8", "replace").decode()}),
        )

    good = provenance(1)
    this = replace(provenance(2), fingerprint=good.fingerprint)
    claims = [
        Claim(f"{kind}/{name()}{index}", name(), name(), status, name(), name(), "s", NPU, value, name(), name())
        for index, (kind, status, value) in enumerate(
            (kind, status, value)
            for kind in ("latency", "accuracy", "graphs", "relative", "files", "stages")
            for status in (Status.FAIL, Status.PASS, Status.NOT_RUN)
            for value in (None, Value(2.0, name()))
        )
    ]
    passed = {claim.id: replace(Entry.of(claim), status=Status.PASS) for claim in claims}
    problems = [name(), name()]
    return Results(RunInputs(Path()), this, tuple(claims), (name(),)), [Run(good, passed)], problems


@given(st.lists(HOSTILE, min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_no_string_of_a_file_acts_as_markdown_or_html(strings: list[str]) -> None:
    """The same elements as those of a run with harmless names, and no element that a name could have made."""

    def elements(names: Sequence[str]) -> list[str]:
        made = PARSER.parse(markdown(*hostile_run(names)))
        inner = {child.type for token in made for child in token.children or ()}
        assert inner <= {"text", "code_inline", "strong_open", "strong_close", "softbreak"}, inner
        return [token.type for token in made]

    assert elements([f"x{string}" for string in strings]) == elements(["harmless"])
