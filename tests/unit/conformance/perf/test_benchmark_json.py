"""pytest-benchmark's file against the source, by reading it as pytest-benchmark does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2_npu.conformance.perf import benchmark_json, documented
from qwen2_npu.conformance.perf.documented import BASELINES, BaselineError

NUMBERS = documented.read()


def test_the_committed_file_agrees_with_the_source() -> None:
    benchmark_json.check(NUMBERS)
    content = json.loads((BASELINES / benchmark_json.FILE).read_text(encoding="utf-8"))
    found = {bench["fullname"]: bench["stats"] for bench in content["benchmarks"]}
    assert set(found) == {number.row.node_id for number in NUMBERS}
    for number in NUMBERS:
        stats = found[number.row.node_id]
        assert {stats[name] for name in ("min", "max", "mean", "median")} == {number.ms / 1e3}
        assert stats["stddev"] == stats["iqr"] == 0
        assert stats["rounds"] == (1 if number.row.phase == "prefill" else 1023)
    assert set(content) >= {"machine_info", "commit_info", "benchmarks", "datetime", "version"}


def test_provenance_travels_with_each_number() -> None:
    bench = benchmark_json.content(NUMBERS)["benchmarks"][0]["extra_info"]
    assert bench["label"] == "原始脚本"
    assert bench["machine"] == "Atlas 800I A2"
    assert bench["versions"] == {"transformers": "4.37.0"}
    assert (bench["rounding"], bench["unit"], bench["ms"]) == (0.5, "ms", 575.0)


def test_a_changed_number_is_named(tmp_path: Path) -> None:
    path = benchmark_json.write(NUMBERS, tmp_path)
    benchmark_json.check(NUMBERS, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["benchmarks"][5]["stats"]["mean"] = 0.02
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BaselineError, match=NUMBERS[5].row.id):
        benchmark_json.check(NUMBERS, tmp_path)
    path.unlink()
    with pytest.raises(BaselineError, match="baselines --write"):
        benchmark_json.check(NUMBERS, tmp_path)
