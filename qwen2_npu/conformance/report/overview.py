"""The overview's tables: every claim that has a place, as a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen2_npu.conformance.machine.verified import Where
from qwen2_npu.conformance.report.changes import Change, Kind
from qwen2_npu.conformance.report.claims import Claim, Status, worst
from qwen2_npu.conformance.report.labels import STEPS, labels

GLYPHS = {Status.PASS: "✓", Status.FAIL: "✗", Status.NOT_RUN: "–", Status.NOT_COMPARABLE: "≠"}
"""Read without colours."""

CLASSES = {Status.PASS: "pass", Status.FAIL: "fail", Status.NOT_RUN: "not-run", Status.NOT_COMPARABLE: "not-comparable"}


@dataclass(frozen=True)
class Cell:
    """One or more claims. ``empty``: there is no claim."""

    text: str
    style: str
    hint: str
    anchor: str = ""
    empty: bool = False


@dataclass(frozen=True)
class Column:
    """``wheres``: what its claims were verified on; empty where none was run."""

    group: str
    name: str
    wheres: tuple[Where, ...]


@dataclass(frozen=True)
class Overview:
    """One table. ``groups``: heading -> number of columns under it. ``rows``: name, the guide's name, cells."""

    title: str
    groups: dict[str, int]
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]


def overviews(claims: Sequence[Claim], changes: Sequence[Change]) -> list[Overview]:
    """The ladder, then the batches."""
    changed = {change.claim.id: change for change in changes}
    batches = sorted({claim.place.row for claim in claims if claim.place and claim.place.table == "batch"}, key=int)
    tables = (("ladder", "Every step of the ladder", STEPS), ("batch", "Batch sweeps, graph mode, fused_qkv", batches))
    return [_overview(name, title, list(rows), claims, changed) for name, title, rows in tables]


def _overview(
    table: str, title: str, rows: list[str], claims: Sequence[Claim], changed: Mapping[str, Change]
) -> Overview:
    cells: dict[tuple[str, str, str], list[Claim]] = {}
    for claim in claims:
        if claim.place is not None and claim.place.table == table:
            cells.setdefault((claim.place.group, claim.place.column, claim.place.row), []).append(claim)
    names = list(dict.fromkeys((group, column) for group, column, _ in cells))
    groups: dict[str, int] = {}
    for group, _ in names:
        groups[group] = groups.get(group, 0) + 1
    # Columns of one group stand together, in the order in which the groups appear.
    names.sort(key=lambda name: list(groups).index(name[0]))
    columns = tuple(Column(group, name, _wheres(group, name, cells)) for group, name in names)
    filled = tuple(
        (
            row,
            labels().get(row, "") if table == "ladder" else "",
            tuple(_cell(cells.get((column.group, column.name, row), []), changed) for column in columns),
        )
        for row in rows
    )
    return Overview(title, groups, columns, filled)


def _wheres(group: str, column: str, cells: Mapping[tuple[str, str, str], list[Claim]]) -> tuple[Where, ...]:
    run = {
        claim.where
        for (its_group, its_column, _), claims in cells.items()
        for claim in claims
        if (its_group, its_column) == (group, column) and claim.status is not Status.NOT_RUN
    }
    return tuple(sorted(run))


def _cell(claims: list[Claim], changed: Mapping[str, Change]) -> Cell:
    if not claims:
        return Cell("", "empty", "no check belongs here", empty=True)
    status = worst(claim.status for claim in claims)
    change = next((changed[claim.id] for claim in claims if claim.id in changed), None)
    passed = sum(claim.status is Status.PASS for claim in claims)
    value = claims[0].value
    if len(claims) == 1 and value is not None and value.unit == "ms":
        text = f"{GLYPHS[status]} {value.number:.0f}"
    elif 0 < passed < len(claims):
        text = f"{GLYPHS[status]} {passed}/{len(claims)}"
    else:
        text = GLYPHS[status]
    style = CLASSES[status]
    if change is not None:
        style += " drifted" if change.kind is Kind.DRIFTED else " changed" if change.kind is not Kind.FIXED else ""
    hint = "\n".join(f"{claim.title}: {claim.status}" + _because(claim) for claim in claims)
    subject = next((claim for claim in claims if claim.status is status), claims[0])
    return Cell(text, style, hint, anchor(subject))


def _because(claim: Claim) -> str:
    first = (claim.message or claim.reference).splitlines()
    value = "" if claim.value is None else f", {claim.value}"
    return f"{value} ({first[0][:160]})" if first else value


def anchor(claim: Claim) -> str:
    """Where the list of all claims shows it."""
    return "".join(character if character.isalnum() else "-" for character in claim.id)
