"""What `bench` wrote, on the page: claims that pass nothing, and a table per file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.machine.verified import Where
from qwen2_npu.conformance.report import bench
from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.report.page import render
from qwen2_npu.conformance.report.results import Results
from tests.unit.conformance.report.synthetic import Night


def result(step: str, prefill: float, decode: float, **changes: Any) -> dict[str, Any]:
    known = {
        "model": "7B", "weights": "random", "step": step, "mode": "eager", "batch": 4, "dtype": "bfloat16",
        "device": "npu:0", "input_tokens": 1024, "decode_steps": 1023, "prefill_ms": prefill,
        "decode": {"mean": decode, "median": decode, "p99": decode + 1}, "tokens_per_second": 4e3 / decode,
        "prefill_compute_share": None, "decode_memory_share": 0.5, "decode_compute_share": None, "peak_bytes": None,
        "documented_prefill_ms": None, "documented_decode_ms": 24.0, "warnings": [], "faults": [],
    }  # fmt: skip
    return known | changes


def write(folder: Path, *results: dict[str, Any], name: str = "bench.json", **changes: Any) -> RunInputs:
    content = {"schema": 2, "provenance": Night(0).provenance.to_json(), "results": list(results), **changes}
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return RunInputs.of(folder)


def test_claims_say_what_was_measured_and_pass_nothing(tmp_path: Path) -> None:
    inputs = write(tmp_path, result("original", 900.0, 60.0), name="bench-7B.json")
    prefill, decode = bench.claims(inputs)
    assert (prefill.value and prefill.value.number, decode.value and decode.value.number) == (900.0, 60.0)
    assert {claim.status for claim in (prefill, decode)} == {Status.NOT_COMPARABLE}
    assert decode.where is Where.NPU
    assert decode.subject == "random weights, bfloat16, 1024 tokens + 1023 steps"


def test_what_two_cards_measured_is_a_check_of_its_own(tmp_path: Path) -> None:
    inputs = write(tmp_path, result("swiglu", 9.0, 6.0, cards=1), result("swiglu", 9.0, 6.0, cards=2))
    one, two = (claim for claim in bench.claims(inputs) if claim.id.endswith("decode"))
    assert (one.id, two.id) == (
        "bench/7B-bfloat16-eager-swiglu-b4-decode",
        "bench/7B-bfloat16-eager-swiglu-tp2-b4-decode",
    )
    assert two.title.startswith("7B on 2 cards, batch 4")


def test_a_faulty_measurement_fails(tmp_path: Path) -> None:
    inputs = write(tmp_path, result("original", 900.0, 60.0, faults=["a missing synchronize"]))
    assert {claim.status for claim in bench.claims(inputs)} == {Status.FAIL}
    assert not Results.of(tmp_path).passed
    noisy = write(tmp_path, result("original", 900.0, 60.0, warnings=["frequency governor powersave"]))
    assert {claim.status for claim in bench.claims(noisy)} == {Status.NOT_COMPARABLE}, "said, and no failure"


def test_the_table_holds_ratios_to_the_stock_model_of_the_same_batch(tmp_path: Path) -> None:
    one = [result("original", 300.0, 50.0, batch=1), result("swiglu", 200.0, 20.0, batch=1)]
    four = [result("original", 900.0, 60.0), result("swiglu", 600.0, 24.0)]
    (table,) = bench.tables(write(tmp_path, *one, *four))
    assert table.headings[:5] == ("batch", "prefill ms", "× original", "decode ms", "× original")
    assert "peak GB" not in table.headings  # nothing stands in it
    assert [row[2][2] for row in table.rows] == ["1.00", "1.50", "1.00", "1.50"]
    assert [row[2][4] for row in table.rows] == ["1.00", "2.50", "1.00", "2.50"]


def test_without_the_stock_model_there_is_no_ratio(tmp_path: Path) -> None:
    (table,) = bench.tables(write(tmp_path, result("swiglu", 600.0, 24.0)))
    assert "× original" not in table.headings


def test_it_is_on_the_page_and_only_where_there_is_one(tmp_path: Path) -> None:
    assert "<h2>Bench</h2>" not in render(Results.of(tmp_path), [])
    write(tmp_path, result("swiglu", 612.5, 24.0))
    page = render(Results.of(tmp_path), [])
    assert "<h2>Bench</h2>" in page
    assert "612" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, "schema 1; this version reads 2: run `qwen2-npu bench` again"),
        ({"results": []}, "it holds no results"),
    ],
)
def test_what_cannot_be_read_is_a_problem(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert write(tmp_path, result("swiglu", 1.0, 1.0), **changes).problems == [f"bench.json cannot be read: {message}"]


def test_a_bench_of_another_commit_is_a_contradiction(tmp_path: Path) -> None:
    Night(0).write(tmp_path)
    write(tmp_path, result("swiglu", 1.0, 1.0), provenance=Night(1).provenance.to_json())
    assert any("bench.json is of commit" in problem for problem in Results.of(tmp_path).problems)


def test_benchmark_files_are_not_taken_for_it(tmp_path: Path) -> None:
    inputs = RunInputs.of(Night(0).write(tmp_path))
    assert inputs.benchmarks
    assert not inputs.benches


def test_8_bit_weights_are_said(tmp_path: Path) -> None:
    inputs = write(tmp_path, result("kv_scatter", 9.0, 6.0), result("w8a8", 9.0, 4.0))
    subjects = [claim.subject for claim in bench.claims(inputs) if claim.id.endswith("decode")]
    assert subjects == [
        "random weights, bfloat16, 1024 tokens + 1023 steps",
        "random weights in w8a8, bfloat16, 1024 tokens + 1023 steps",
    ]
    (table,) = bench.tables(inputs)
    assert "7B, random weights in bfloat16, w8a8, bfloat16, 1024 tokens + 1023 steps, eager" in table.title
