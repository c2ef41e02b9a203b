"""Row ids and node ids: the names baselines are kept under."""

from __future__ import annotations

from pathlib import Path

from qwen2_npu.conformance.perf.documented import BASELINES, read
from qwen2_npu.conformance.perf.rows import TEST, Configuration, Row, user_rows


def test_ids_are_unique_and_name_the_test_that_exists() -> None:
    rows = [number.row for number in read()]
    assert len({row.id for row in rows}) == len(rows)
    assert rows[0].node_id == f"{TEST}[7b-ladder-b4-eager-original-prefill]"
    file, _, name = TEST.partition("::")
    assert f"def {name}(" in (BASELINES.parent / file).read_text(encoding="utf-8")


def test_rows_of_a_users_model() -> None:
    rows = user_rows("Mine-1B", (1, 4), ("eager",), ("swiglu",))
    assert [row.id for row in rows] == [
        "mine-1b-user-b1-eager-swiglu-prefill",
        "mine-1b-user-b1-eager-swiglu-decode",
        "mine-1b-user-b4-eager-swiglu-prefill",
        "mine-1b-user-b4-eager-swiglu-decode",
    ]
    assert rows[0] == Row("mine-1b-user", Configuration("Mine-1B", 1, 1, "eager", "swiglu"), "prefill")
    assert str(rows[0].configuration) == "Mine-1B, batch 1, eager, swiglu"
    assert Path(TEST.partition("::")[0]).name == "test_latency.py"
