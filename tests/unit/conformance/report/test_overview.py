"""The overview's cells."""

from __future__ import annotations

import pytest

from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.report.claims import Claim, Place, Status, Value
from qwen2_npu.conformance.report.overview import Cell, Overview, overviews
from tests.unit.conformance.report.synthetic import DRIFTING, MISSING_GRAPH, SLOW

assert MISSING_GRAPH.startswith("0.5B")
assert "b16" in DRIFTING
assert "fused_qkv" in SLOW


@pytest.fixture(scope="module")
def tables(night) -> dict[str, Overview]:  # type: ignore[no-untyped-def]
    return dict(zip(("ladder", "batch"), overviews(night.results.claims, night.changes), strict=True))


def cell(table: Overview, row: str, group: str, column: str) -> Cell:
    (cells,) = (cells for name, _, cells in table.rows if name == row)
    names = [(found.group, found.name) for found in table.columns]
    return cells[names.index((group, column))]


def test_every_placed_claim_is_in_a_cell(night, tables: dict[str, Overview]) -> None:  # type: ignore[no-untyped-def]
    places = {claim.place for claim in night.results.claims if claim.place is not None}
    cells = {
        Place(name, row, column.group, column.name)
        for name, table in tables.items()
        for row, _, cells in table.rows
        for column, found in zip(table.columns, cells, strict=True)
        if not found.empty
    }
    assert places == cells


def test_cells(tables: dict[str, Overview]) -> None:
    slow = cell(tables["ladder"], "fused_qkv", "7B, ms", "graph decode")
    assert (slow.text, slow.style) == ("✗ 27", "fail changed")
    drifting = cell(tables["batch"], "16", "7B, ms", "graph prefill")
    assert (drifting.text, drifting.style) == ("✓ 1274", "pass drifted")
    half = cell(tables["ladder"], "swiglu", "Graphs", "0.5B")
    assert (half.text, half.style) == ("– 1/2", "not-run changed")
    assert cell(tables["ladder"], "original", "Accuracy", "suite").empty


def test_headings_say_what_was_verified_where(tables: dict[str, Overview]) -> None:
    wheres = {(column.group, column.name): [str(w) for w in column.wheres] for column in tables["ladder"].columns}
    assert wheres["7B, ms", "graph decode"] == ["real NPU"]
    assert wheres["72B on 8 cards, ms", "graph decode"] == []


def test_a_mixed_column_shows_both_devices() -> None:
    def one(step: str, verified: str) -> Claim:
        place = Place("ladder", step, "g", "c")
        return Claim(step, "a", "t", Status.PASS, verified=Verified.read(verified), value=Value(1, "ms"), place=place)

    table, _ = overviews([one("swiglu", "npu (x)"), one("fused_qkv", "emulated (x)")], [])
    assert [str(where) for where in table.columns[0].wheres] == ["emulated", "real NPU"]


def test_the_guide_s_names_stand_beside_the_steps(tables: dict[str, Overview]) -> None:
    labels = {row: label for row, label, _ in tables["ladder"].rows}
    assert labels["fused_qkv"] == "qkv融合"
    assert labels["original"] == "原始脚本"
