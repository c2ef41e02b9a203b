"""The page, as a browser and a reader meet it."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwen2_npu.conformance.report import history
from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.history import Run
from qwen2_npu.conformance.report.overview import anchor
from qwen2_npu.conformance.report.page import bisection, render, verdict
from qwen2_npu.conformance.report.results import Results
from tests.unit.conformance.report.conftest import Made
from tests.unit.conformance.report.synthetic import IDENTITY, SLOW, CaseText, Night, commit_of, write_junit

VOID = {"meta", "link", "br", "col", "img", "input", "hr"}


class Parsed(HTMLParser):
    """Ids, references, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.references += [value for name in ("href", "src", "xlink:href") if (value := values.get(name))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def text_of(page: str) -> str:
    return " ".join(" ".join(Parsed(page).texts).split())


def test_opens_offline_and_is_well_formed(page: str) -> None:
    parsed = Parsed(page)
    assert parsed.open == []
    assert all(reference.startswith("#") for reference in parsed.references)
    assert "<script" not in page
    assert not re.search(r"@import|url\((?!#)", page), "a style that loads something"
    svg_ids = {reference for reference in parsed.references if reference.startswith("#m")}
    assert {reference[1:] for reference in parsed.references} <= set(parsed.ids), svg_ids


def test_every_claim_has_its_row(page: str, night) -> None:  # type: ignore[no-untyped-def]
    ids = Parsed(page).ids
    for claim in night.results.claims:
        assert ids.count(anchor(claim)) == 1, claim.id


def test_the_first_screen_says_what_regressed_by_how_much_since_which_commit(page: str) -> None:
    first = text_of(page).partition("All checks in one table")[0]
    assert f"4 checks regressed since {commit_of(9)[:10]} (2026-10-10); 1 check passed before and was not run;" in first
    assert "1 check passes but got worse" in first
    assert "7B, batch 4, graph, fused_qkv: decode qkv融合" in first
    assert "23.4 → 27.1 ms (+16 %)" in first
    assert commit_of(9)[:10] in first
    assert commit_of(10)[:10] in first
    pinned = f"taskset -c {IDENTITY['affinity']} "
    pinned += f"pytest -q tests/perf/test_latency.py --device npu --gate --gate-rows={SLOW}"
    assert f"Run this check again: {pinned}" in first
    assert f"git bisect start {commit_of(10)[:12]} {commit_of(9)[:12]} and git bisect run {pinned}" in first
    assert "compared with 11 earlier runs of this fingerprint" in first


def test_chinese_stands_in_html_and_not_in_charts(page: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not re.search(r"[\u4e00-\u9fff]", svg)
    assert "替换FlashAttention&amp;&amp;cos/sin优化" in page


def test_charts_follow_light_and_dark(page: str) -> None:
    assert "var(--documented)" in page
    assert "#fe01" not in page
    assert "prefers-color-scheme: dark" in page
    used, defined = set(re.findall(r"var\(--([\w-]+)\)", page)), set(re.findall(r"--([\w-]+):", page))
    assert used <= defined


def test_messages_cannot_break_the_page_and_a_self_test_says_so(tmp_path: Path) -> None:
    Night(0, self_test=True).write(tmp_path)
    (tmp_path / "predictions.json").write_text("[]", encoding="utf-8")
    evil = "</pre><script>alert(1)</script>"
    case = CaseText("tests.perf.test_latency", f"test_latency[{SLOW}]", failure=evil)
    write_junit(tmp_path / "perf.xml", [case], Night(0).provenance)
    made = render(Results.of(tmp_path), [])
    assert "<script" not in made
    assert Parsed(made).open == []
    assert "SELF-TEST: latencies of this run were injected" in made


def test_an_empty_run_is_not_green(tmp_path: Path) -> None:
    (tmp_path / "predictions.json").write_text("[]", encoding="utf-8")
    made = render(Results.of(tmp_path), [])
    first = text_of(made).partition("The ladder: documented")[0]
    assert "Nothing was run" in first
    assert "✓" not in first.replace("✓ pass ·", "").replace("✓ 0 pass", "")
    assert "not run: the results folder holds no verify*.json" in text_of(made)
    assert "not run: this run lowered no graph" in text_of(made)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib.figure", "scipy.special"])
def test_without_its_libraries_the_way_to_get_them(module: str, night, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"needs? .*(jinja2|scipy).*: pip install 'qwen2-npu\[report\]'"):
        render(night.results, night.history)


def test_a_count_of_zero_has_no_colour(page: str, tmp_path: Path) -> None:
    """Neither a red "0 FAIL" nor a green "0 pass"."""
    (tmp_path / "predictions.json").write_text("[]", encoding="utf-8")
    empty = render(Results.of(tmp_path), [])
    assert '<span class="muted">✗ 0 FAIL</span>' in empty
    assert '<span class="muted">✓ 0 pass</span>' in empty
    for made in (page, empty):
        assert not re.search(r'<(\w+) class="[^"]*\b(pass|fail|warn|amount)\b[^"]*"[^>]*>\W*(0\b|–<)', made)
    assert '<span class="fail">✗ 4 FAIL</span>' in page


def test_why_checks_have_no_result(page: str, night: Made) -> None:
    first = text_of(page).partition("All checks in one table")[0]
    untold = sum(claim.status is Status.NOT_RUN and not claim.message for claim in night.results.claims)
    assert untold > 30, "test files of the suites that wrote nothing"
    assert "40 × not run: needs 8 cards of this kind: npu has 2" in first
    assert f"{untold} × not run: no file of this run has a result for it" in first


# ---- the verdict ----------------------------------------------------------------------------------------------------
def test_verdicts(tmp_path: Path) -> None:
    quiet = Results.of(Night(0).write(tmp_path / "quiet"))
    said = verdict(quiet, [])
    assert said.style == "warn", "72B was not run"
    passed, checks, not_run = quiet.counts()[Status.PASS], len(quiet.claims), quiet.counts()[Status.NOT_RUN]
    assert passed == 255, "what the synthetic night wrote"
    assert (not_run, checks) == (checks - passed, passed + not_run)
    assert said.text == f"Nothing failed; {passed} of {checks} checks passed, {not_run} were not run"
    some = tuple(c.found(Status.NOT_COMPARABLE) if i < 3 else c for i, c in enumerate(quiet.claims))
    assert verdict(replace(quiet, claims=some), []).text.endswith(f" {not_run} were not run, 3 cannot be compared here")
    assert verdict(quiet, [], ["history: x cannot be read"]).style == "fail"
    assert verdict(Results.of(tmp_path / "none"), []).text == "Nothing was run"


def test_green_only_where_everything_passed() -> None:
    some = Results.of(Path("/no/such/folder"))
    every = replace(some, claims=tuple(claim.found(Status.PASS) for claim in some.claims))
    assert verdict(every, []).style == "pass"
    one_less = replace(every, claims=(some.claims[0], *every.claims[1:]))
    assert verdict(one_less, []).style == "warn"


def test_the_same_commit_is_not_bisected(night) -> None:  # type: ignore[no-untyped-def]
    change = night.change(f"latency/{SLOW}")
    this = Run.of(night.results)
    assert bisection(change, this).startswith("git bisect start ")
    same = replace(change, first_bad=change.last_good)
    assert bisection(same, this).startswith("the same commit: not the code")
    assert bisection(replace(change, last_good=None), this) == ""


def test_damaged_history_is_said(night, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "x.json").write_text("{", encoding="utf-8")
    _, problems = history.load(tmp_path)
    assert verdict(night.results, night.changes, problems).text.count("1 problem with the files") == 1
