"""Row ids and node ids: the names baselines are kept under."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.perf.documented import BASELINES, read
from qwen2_npu.conformance.perf.rows import TEST, Configuration, Row, user_rows, weights_of
from qwen2_npu.optimizations import LADDER, ORIGINAL


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


def test_every_step_mode_and_batch_of_a_users_model_has_both_rows() -> None:
    rows = user_rows("M", (1, 4), ("eager", "graph"), ("fused_qkv", "swiglu"))
    assert len({row.id for row in rows}) == len(rows) == 2 * 2 * 2 * 2
    assert {(r.configuration.step, r.configuration.mode, r.configuration.batch, r.phase) for r in rows} == {
        *product(("fused_qkv", "swiglu"), ("eager", "graph"), (1, 4), ("prefill", "decode"))
    }


@pytest.mark.parametrize(
    "changes", [{"table": "other"}, {"phase": "decode"}, {"batch": 8}, {"mode": "eager"}, {"step": "swiglu"}]
)
def test_rows_that_differ_in_anything_have_ids_of_their_own(changes: dict[str, Any]) -> None:
    """What is kept under an id is never another row's; the table stands for the model and its cards."""
    row = Row("7b-batch", Configuration("7B", 1, 4, "graph", "fused_qkv"), "prefill")
    of_row = {key: value for key, value in changes.items() if key in ("table", "phase")}
    rest = {key: value for key, value in changes.items() if key not in of_row}
    other = replace(row, configuration=replace(row.configuration, **rest), **of_row)
    assert other.id != row.id
    assert other.node_id != row.node_id


def test_a_table_holds_one_model_on_one_number_of_cards() -> None:
    kinds = {(number.row.table, number.row.configuration.model, number.row.configuration.cards) for number in read()}
    assert len({table for table, _, _ in kinds}) == len(kinds)
    assert str(Configuration("72B", 8, 4, "graph", "swiglu")) == "72B on 8 cards, batch 4, graph, swiglu"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([ORIGINAL, LADDER[-1]], "random weights"),
        (["w8a16", "w8a16"], "random weights in w8a16"),
        ([LADDER[-1], "w8a16", ORIGINAL, "w8a8"], "random weights in bfloat16, w8a16, w8a8"),
    ],
)
def test_weights_in_8_bits_are_called_so(steps: list[str], words: str) -> None:
    assert weights_of("random", "bfloat16", steps) == words


def test_one_card_is_not_mentioned() -> None:
    row = Configuration("7B", 1, 4, "graph", "swiglu")
    assert [replace(row, cards=cards).model_on_cards for cards in (1, 2)] == ["7B", "7B on 2 cards"]
