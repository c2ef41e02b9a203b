"""Reading pytest's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_npu.conformance.report import junit

FILE = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite timestamp="2026-11-25T01:41:53" tests="5">
<properties><property name="qwen2_npu.verified" value="&quot;cpu&quot;"/></properties>
<testcase classname="tests.graph.test_census" name="test_census[7B-decode-b4-up_to_fused_qkv]"/>
<testcase classname="tests.a" name="test_bad"><properties><property name="ratio" value="1.7"/></properties>
<failure message="AssertionError: short">whole
text</failure></testcase>
<testcase classname="tests.a" name="test_skip"><skipped message="needs an NPU">x.py:3: needs an NPU</skipped></testcase>
<testcase classname="tests.a" name="test_teardown"><skipped message="s">s</skipped><error message="e">e</error>
</testcase>
<testcase classname="tests.a" name="test_after"><failure message="f">f</failure><skipped message="s">s</skipped>
</testcase>
</testsuite><testsuite><testcase classname="tests.b" name="test_of_another_suite"/></testsuite></testsuites>"""


def test_cases(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(FILE, encoding="utf-8")
    session = junit.read(path)
    assert session.properties == {"qwen2_npu.verified": '"cpu"'}
    good, bad, skipped, *both, other = session.cases
    assert (good.module, good.function, good.parameters) == (
        "tests.graph.test_census",
        "test_census",
        "7B-decode-b4-up_to_fused_qkv",
    )
    assert good.tokens == ("7B", "decode", "b4", "fused_qkv")
    assert (bad.outcome, bad.message, bad.properties) == (
        "failed",
        "AssertionError: short\nwhole\ntext",
        {"ratio": "1.7"},
    )
    assert (skipped.outcome, skipped.message) == ("skipped", "needs an NPU")
    assert [case.outcome for case in both] == ["failed", "failed"]
    assert (other.module, other.outcome) == ("tests.b", "passed")


@pytest.mark.parametrize("text", [FILE[:200], "", "<html/>"])
def test_a_file_cut_short_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cut.xml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"cut\.xml is not a (complete )?JUnit file"):
        junit.read(path)
