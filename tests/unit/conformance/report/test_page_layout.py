"""The page in a browser, at the widths of a phone, a small window and a large one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.report import history
from qwen2_npu.conformance.report.page import render
from qwen2_npu.conformance.report.results import Results
from tests.unit.conformance.report.synthetic import SLOW, CaseText, Night, write_junit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: it measures the layout"),
]

WIDTHS = (500, 1000, 1600)

MEASURE = """<script>
const shown = [...document.querySelectorAll('th, td')].filter(cell => cell.getClientRects().length);
const heads = shown.filter(cell => cell.tagName == 'TH').map(cell => [cell, cell.getBoundingClientRect()]);
const overlaps = [];
heads.forEach(([a, p], i) => heads.slice(i + 1).forEach(([b, q]) => {
  const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
  const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
  if (wide > 1 && high > 1) overlaps.push(a.textContent.trim() + ' | ' + b.textContent.trim());
}));
const name = element => element.tagName + '.' + element.className + ': ' + element.textContent.trim().slice(0, 60);
const found = {
  inner: window.innerWidth,
  scroll: document.documentElement.scrollWidth,
  overlaps: overlaps,
  spilled: shown.filter(cell => cell.scrollWidth > cell.clientWidth + 1).map(name),
  outside: [...document.body.querySelectorAll('*')].filter(element =>
    !element.closest('.scroll, .labelled') && element.getBoundingClientRect().right > innerWidth + 1).map(name),
  narrow: shown.filter(cell => cell.textContent.trim().length > 12 && cell.clientWidth < 40
    && !cell.matches('.turned')).map(name),
  shrunk: [...document.querySelectorAll('svg')].filter(svg => svg.getClientRects().length
    && Math.abs(svg.getBoundingClientRect().height - svg.getAttribute('height')) > 1).length,
  labels: [...document.querySelectorAll('.rows > div')].filter(row => row.getClientRects().length
    && row.scrollHeight > row.clientHeight + 1).map(name),
};
document.body.setAttribute('data-found', JSON.stringify(found));
</script>"""
"""Writes into the page what is wrong with its layout."""


@pytest.fixture
def measure(tmp_path: Path) -> Callable[[str, int], dict[str, Any]]:
    def measured(page: str, width: int) -> dict[str, Any]:
        path = tmp_path / "measured.html"
        path.write_text(page.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--dump-dom", path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        found = re.search(r'<body data-found="([^"]*)"', done.stdout)
        assert found, done.stdout[:500]
        return json.loads(html.unescape(found[1]))  # type: ignore[no-any-return]

    return measured


def good(width: int) -> dict[str, Any]:
    return {
        "inner": width, "scroll": width, "overlaps": [], "spilled": [], "outside": [], "narrow": [], "shrunk": 0,
        "labels": [],
    }  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_an_eventful_night(page: str, width: int, measure: Callable[[str, int], dict[str, Any]]) -> None:
    assert measure(page, width) == good(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_results(tmp_path: Path, width: int, measure: Callable[[str, int], dict[str, Any]]) -> None:
    assert measure(render(Results.of(tmp_path / "none"), []), width) == good(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_long_tokens_in_every_field(tmp_path: Path, width: int, measure: Callable[[str, int], dict[str, Any]]) -> None:
    long = "x" * 300
    good_run, bad_run = (
        Night(number, identity={**Night(0).identity, "verified": f"npu ({long})", "soc": long}, slower=slower)
        for number, slower in ((0, {}), (1, {SLOW: 1.5}))
    )
    good_run.remember(tmp_path / "history")
    folder = bad_run.write(tmp_path)
    verification = {**bad_run.verification(), "model": long, "dtype": long}
    verification["environment"] = {**verification["environment"], "verified": f"npu ({long})"}
    (folder / "verify.json").write_text(json.dumps(verification), encoding="utf-8")
    cases = [
        CaseText("tests.perf.test_latency", f"test_latency[{SLOW}]", failure=long),
        CaseText(f"tests.{long}", f"test_{long}[{long}]", failure=long),
        CaseText(f"tests.skipped.{long}", f"test_{long}", skip=long),
    ]
    write_junit(folder / "perf.xml", cases, bad_run.provenance)
    (folder / f"verify-{long[:200]}.json").write_text("{", encoding="utf-8")
    runs, problems = history.load(tmp_path / "history")
    made = render(Results.of(folder), runs, [*problems, long])
    assert made.count(long) > 8
    assert measure(made, width) == good(width)
