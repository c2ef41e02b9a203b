"""The few lines that a workflow shows."""

from __future__ import annotations

from pathlib import Path

from qwen2_npu.conformance.report.results import Results
from qwen2_npu.conformance.report.summary import markdown
from tests.unit.conformance.report.synthetic import SLOW, CaseText, Night, commit_of, write_junit


def test_names_the_rows_the_amounts_and_the_commits(night) -> None:  # type: ignore[no-untyped-def]
    text = markdown(night.results, night.history)
    assert text.startswith("## 4 checks regressed")
    row = next(line for line in text.splitlines() if f"`latency/{SLOW}`" in line)
    for part in ("23.4 → 27.1 ms (+16 %)", commit_of(9)[:10], commit_of(10)[:10], "real NPU"):
        assert part in row
    assert f"`git bisect start {commit_of(10)[:12]} {commit_of(9)[:12]}` and `git bisect run " in text
    assert text.count(f"(`latency/{SLOW}`): slower") == 1


def test_a_message_cannot_break_the_table(tmp_path: Path) -> None:
    Night(0).write(tmp_path)
    case = CaseText("tests.perf.test_latency", f"test_latency[{SLOW}]", failure="a | b\nc")
    write_junit(tmp_path / "perf.xml", [case], Night(0).provenance)
    failed = [line for line in markdown(Results.of(tmp_path), []).splitlines() if line.startswith("- **")]
    assert any(line.endswith("a \\| b c") for line in failed)


def test_nothing_was_run(tmp_path: Path) -> None:
    assert markdown(Results.of(tmp_path), []).startswith("## Nothing was run")
