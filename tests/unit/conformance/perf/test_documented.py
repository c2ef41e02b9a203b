"""The documented numbers against a second transcription of the guide's tables, typed apart from the first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.perf.documented import BASELINES, SOURCE, BaselineError, Measured, by_id, read

# 优化项 | 单算子 全量 | 单算子 增量 | 图 全量 | 图 增量
LADDER_7B = """
原始脚本                       575  52 585 44
固定kv cache                   577  53 545 41
替换FlashAttention&&cos/sin优化 403  33 389 26
Add+RMSNorm融合                385  27 369 24
全量优化计算量                 361  25 345 24
qkv融合                        366  25 345 24
"""
LADDER_72B = """
原始脚本                       1179 207 1228 165
固定kv cache                   1185 206 1092  65
替换FlashAttention&&cos/sin优化 1043 149  953  47
Add+RMSNorm融合                 760 118  724  41
全量优化计算量                  703 125  708  41
qkv融合(单算子精度异常)         698 122  676  38
"""
ADDED_72B = "IFA算子计算优化+tiling全下沉 689 122 688 37"
# batch size | 图 全量 | 图 增量
BATCHES_7B = {1: (94, 23), 4: (345, 24), 8: (636, 29), 16: (1244, 33), 32: (2496, 36), 48: (3692, 45)}
BATCHES_72B = {1: (224, 38), 2: (360, 38), 4: (676, 38), 8: (1259, 39), 16: (2437, 42), 32: (4920, 47)}

STEPS = {
    "原始脚本": "original",
    "固定kv cache": "fixed_kv_cache",
    "替换FlashAttention&&cos/sin优化": "flash_attention",
    "Add+RMSNorm融合": "add_rms_norm",
    "全量优化计算量": "last_token_logits",
    "qkv融合": "fused_qkv",
    "qkv融合(单算子精度异常)": "fused_qkv",
    "IFA算子计算优化+tiling全下沉": "ifa_tiling",
}

Number = tuple[str, str, int, str, str, str, str, float]


def ladder(text: str, table: str, model: str) -> set[Number]:
    numbers: set[Number] = set()
    for line in text.strip().splitlines():
        *label, eager_prefill, eager_decode, graph_prefill, graph_decode = line.split()
        name = " ".join(label)
        for mode, phase, ms in (
            ("eager", "prefill", eager_prefill),
            ("eager", "decode", eager_decode),
            ("graph", "prefill", graph_prefill),
            ("graph", "decode", graph_decode),
        ):
            numbers.add((table, model, 4, mode, STEPS[name], name, phase, float(ms)))
    return numbers


def batches(rows: dict[int, tuple[int, int]], table: str, model: str) -> set[Number]:
    return {
        (table, model, batch, "graph", "fused_qkv", f"batch size {batch}", phase, float(ms))
        for batch, pair in rows.items()
        for phase, ms in zip(("prefill", "decode"), pair, strict=True)
    }


def test_every_number_of_the_guide_is_there_and_no_other() -> None:
    parts = (
        ladder(LADDER_7B, "7b-ladder", "7B"),
        batches(BATCHES_7B, "7b-batch", "7B"),
        ladder(LADDER_72B, "72b-ladder", "72B"),
        batches(BATCHES_72B, "72b-batch", "72B"),
        ladder(ADDED_72B, "72b-20240820", "72B"),
    )
    assert [len(part) for part in parts] == [24, 12, 24, 12, 4]
    found = set()
    for number in read():
        what = number.row.configuration
        found.add(
            (number.row.table, what.model, what.batch, what.mode, what.step, number.label, number.row.phase, number.ms)
        )
    assert found == set().union(*parts)
    assert len(read()) == 76


def test_conditions_cards_versions_and_notes() -> None:
    for number in read():
        conditions = number.conditions
        assert (conditions.machine, conditions.sku, conditions.host) == ("Atlas 800I A2", "unknown", "arm64")
        assert (conditions.dtype, conditions.input_tokens, conditions.output_tokens) == ("bfloat16", 1024, 1024)
        assert (conditions.unit, conditions.rounding, conditions.decode_steps) == ("ms", 0.5, 1023)
        wanted = {"transformers": "4.37.0"}
        if number.row.configuration.model == "72B":
            wanted["deepspeed"] = "0.14.2"
        assert dict(number.versions) == wanted
        assert number.row.configuration.cards == (8 if number.row.configuration.model == "72B" else 1)
    assert "单算子精度异常" in by_id()["72b-ladder-b4-eager-fused_qkv-prefill"].note
    assert "names no step" in by_id()["7b-batch-b48-graph-fused_qkv-decode"].note


def test_a_number_that_stands_in_two_tables_is_the_same() -> None:
    by_configuration: dict[tuple[object, str], set[float]] = {}
    for number in read():
        by_configuration.setdefault((number.row.configuration, number.row.phase), set()).add(number.ms)
    assert all(len(values) == 1 for values in by_configuration.values())
    assert len(by_configuration) == 72  # batch 4 of the two batch sweeps is the last row of the two ladders


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[94, 23]", "[94]", "has 1 numbers for 2 columns"),
        ("[94, 23]", "[94, 23, 24]", "has 3 numbers for 2 columns"),
        ("[94, 23]", "[94, 0]", "0 ms is a placeholder"),
        ("[94, 23]", "[94, 1]", "1 ms is a placeholder"),
        ("[94, 23]", "[94, true]", "True ms is a placeholder"),
        ("numbers = 76", "numbers = 75", "holds 76 numbers and declares 75"),
        ("numbers = 76", "", "KeyError: 'numbers'"),
        ('columns = ["graph-prefill"', 'columns = ["gragh-prefill"', "column 'gragh-prefill'"),
        ("[94, 23]", "[94, 23.5]", "23.5 ms is a placeholder"),
        ('step = "add_rms_norm"', 'step = "add_norm"', "no step 'add_norm'"),
        ('model = "72B"', 'model = "70B"', "no model '70B'"),
        ('columns = ["graph-prefill"', 'columns = ["graph-warmup"', "column 'graph-warmup'"),
        ("batch = 16,", "batch = 32,", "is there twice"),
        ("numbers = 76", "numbers = 77", "holds 76 numbers and declares 77"),
        ("rounding = 0.5", "", "rounding"),
        ("[conditions]", "[conditions", "not valid TOML"),
    ],
)
def test_a_damaged_source_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = (BASELINES / SOURCE).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / SOURCE).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(BaselineError, match=message.replace("[", r"\[")):
        read(tmp_path / SOURCE)


def test_without_a_checkout_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="run from a checkout"):
        documented.read(tmp_path / SOURCE)


# ---- what may be held against them ---------------------------------------------------------------------------------
PREFILL, DECODE = "7b-ladder-b4-eager-original-prefill", "7b-ladder-b4-graph-fused_qkv-decode"


def as_documented(id: str, **changes: Any) -> Measured:
    row = by_id()[id].row
    return replace(Measured(row.configuration, row.phase, "bfloat16", 1024, 1023, "4.37.0"), **changes)


def test_what_was_measured_as_documented_may_be_held_against_it() -> None:
    for number in read():
        assert documented.why_not(number, as_documented(number.row.id)) == ""


def test_our_own_steps_are_the_same_model_on_every_transformers() -> None:
    assert documented.find(as_documented(DECODE, transformers="5.24.0")) == (by_id()[DECODE], "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transformers": "5.24.0"}, "575 ms are of the model of transformers 4.37.0, and 5.24.0 is installed"),
        ({"dtype": "float32"}, "documented in bfloat16, measured in float32"),
        ({"input_tokens": 16}, "documented for 1024 tokens, measured with 16"),
    ],
)
def test_what_was_measured_otherwise_may_not(changes: dict[str, Any], reason: str) -> None:
    found, said = documented.find(as_documented(PREFILL, **changes))
    assert found is None
    assert reason in said


def test_fewer_decode_steps_are_less_work_and_more_are_not() -> None:
    for steps, held in ((1022, False), (1023, True), (4096, True)):
        assert (documented.find(as_documented(DECODE, decode_steps=steps))[0] is not None) is held
    assert documented.find(as_documented(PREFILL, decode_steps=1))[0] is not None


@pytest.mark.parametrize("changes", [{"batch": 3}, {"model": "0.5B"}, {"cards": 8}, {"step": "swiglu"}])
def test_a_configuration_without_a_row_has_no_number_and_no_reason(changes: dict[str, Any]) -> None:
    measured = as_documented(DECODE)
    measured = replace(measured, configuration=replace(measured.configuration, **changes))
    assert documented.find(measured) == (None, "")
    assert documented.why_not(by_id()[DECODE], measured).startswith(f"row {DECODE} is of 7B, batch 4")


def test_a_patch_release_has_the_same_stock_model() -> None:
    number = by_id()[PREFILL]
    assert documented.other_stock(number, "4.37.2") == ""
    assert documented.other_stock(number, "4.38.0") != ""
    assert documented.stock_name("5.24.0") == "stock-5.x"


def test_an_installed_wheel_has_no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = as_documented(DECODE)
    monkeypatch.setattr(documented, "BASELINES", tmp_path)
    assert documented.find(measured) == (None, "")


# ---- each rule alone ------------------------------------------------------------------------------------------------
def test_two_milliseconds_are_a_latency_and_bytes_that_are_no_text_are_damage(tmp_path: Path) -> None:
    text = (BASELINES / SOURCE).read_text(encoding="utf-8")
    (tmp_path / SOURCE).write_text(text.replace("[94, 23]", "[94, 2]"), encoding="utf-8")
    assert by_id(tmp_path / SOURCE)["7b-batch-b1-graph-fused_qkv-decode"].ms == 2.0
    (tmp_path / "bytes.toml").write_bytes(b"\xff" + text.encode())
    with pytest.raises(BaselineError, match="is not valid TOML"):
        read(tmp_path / "bytes.toml")


@pytest.mark.parametrize("tokens", [1023, 1025])
def test_one_token_more_or_fewer_is_another_prompt(tokens: int) -> None:
    found, reason = documented.find(as_documented(DECODE, input_tokens=tokens))
    assert found is None
    assert reason == f"documented for 1024 tokens, measured with {tokens}"


@pytest.mark.parametrize("dtype", ["float16", "float32", "aaa", "zzz"])
def test_another_dtype_is_another_quantity(dtype: str) -> None:
    assert documented.why_not(by_id()[DECODE], as_documented(DECODE, dtype=dtype)).startswith("documented in bfloat16")


@pytest.mark.parametrize("transformers", ["4.36.9", "4.38.0", "3.37.0", "5.37.0", "4.370.0"])
def test_the_stock_model_is_of_its_minor_release(transformers: str) -> None:
    assert documented.other_stock(by_id()[PREFILL], transformers)
    assert documented.other_stock(by_id()[DECODE], transformers) == "", "our own steps are not transformers' model"


def test_a_phase_is_never_held_against_the_other_s_number() -> None:
    """24 ms and 345 ms of one configuration."""
    prefill = DECODE.replace("decode", "prefill")
    assert [documented.find(as_documented(id))[0] for id in (DECODE, prefill)] == [by_id()[DECODE], by_id()[prefill]]
    assert (by_id()[DECODE].ms, by_id()[prefill].ms) == (24.0, 345.0)
    for id, phase in ((DECODE, "prefill"), (prefill, "decode")):
        wrong = replace(as_documented(id), phase=phase)  # type: ignore[arg-type]
        assert documented.why_not(by_id()[id], wrong).startswith(f"row {id} is of 7B, batch 4, graph, fused_qkv")


def test_the_suite_s_own_row_is_measured_in_the_documented_dtype() -> None:
    number, prefill = by_id()[DECODE], by_id()[PREFILL]
    assert documented.why_not_row(number, 1024, 1023, "5.24.0") == ""
    assert documented.why_not_row(number, 1024, 1022, "5.24.0") == "documented for 1023 decode steps, measured in 1022"
    assert documented.why_not_row(number, 512, 1023, "5.24.0") == "documented for 1024 tokens, measured with 512"
    assert documented.why_not_row(prefill, 1024, 1, "4.37.0") == ""
    assert "5.24.0 is installed" in documented.why_not_row(prefill, 1024, 1023, "5.24.0")


@pytest.mark.parametrize("step", ["swiglu", "a step"])
def test_a_step_of_ours_is_the_same_model_whatever_its_name(step: str) -> None:
    number = by_id()[PREFILL]
    row = replace(number.row, configuration=replace(number.row.configuration, step=step))
    assert documented.other_stock(replace(number, row=row), "5.24.0") == ""
    assert documented.other_stock(number, "5.24.0") != ""
