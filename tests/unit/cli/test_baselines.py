"""``qwen2-npu baselines``."""

from __future__ import annotations

import shutil
from pathlib import Path

from click.testing import CliRunner, Result

from qwen2_npu.cli import main
from qwen2_npu.conformance.perf import benchmark_json, documented
from qwen2_npu.conformance.perf.documented import BASELINES


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["baselines", *map(str, arguments)])


def test_it_shows_all_tables() -> None:
    result = run()
    assert result.exit_code == 0
    for text in (
        "qkv融合",
        "72b-20240820",
        "4920",
        "单算子精度异常: the guide marks",
        "76 numbers, ms: Atlas 800I A2 (SKU unknown), arm64 host",
    ):
        assert text in result.output


def test_it_writes_what_it_then_agrees_with(tmp_path: Path) -> None:
    shutil.copy(BASELINES / documented.SOURCE, tmp_path)
    absent = run("--check", "--folder", tmp_path)
    assert absent.exit_code == 2
    assert "baselines --write" in absent.output
    written = run("--write", "--check", "--folder", tmp_path)
    assert written.exit_code == 0, written.output
    assert "in all 76 numbers" in written.output
    assert (tmp_path / benchmark_json.FILE).read_bytes() == (BASELINES / benchmark_json.FILE).read_bytes()
