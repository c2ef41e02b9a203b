"""What a report can say: a claim, its status, and what it was verified on."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from qwen2_npu.conformance.machine.verified import NOT_SAID, Verified, Where


class Status(StrEnum):
    """From the worst to the best; see :func:`worst`."""

    FAIL = "FAIL"
    NOT_RUN = "not run"
    NOT_COMPARABLE = "not comparable"
    PASS = "pass"


def worst(statuses: Iterable[Status]) -> Status:
    """Of several claims shown as one; nothing at all was not run."""
    return min(statuses, key=list(Status).index, default=Status.NOT_RUN)


@dataclass(frozen=True)
class Value:
    """The claim's number. ``unit`` is shown behind it."""

    number: float
    unit: str
    lower_is_better: bool = True

    def __str__(self) -> str:
        return f"{plain_number(self.number)} {self.unit}".strip()

    def change_from(self, other: Value) -> str:
        """``24.1 → 27.9 ms (+16 %)``."""
        change = ""
        if other.number and math.isfinite(self.number) and math.isfinite(other.number):
            percent = (self.number / other.number - 1) * 100
            change = f" ({percent:+.0f}\u00a0%)" if abs(percent) >= 10 else f" ({percent:+.1f}\u00a0%)"
        return f"{plain_number(other.number)} → {self}{change}"


REASONS = 5
"""Reasons that are listed by themselves; see :func:`without_result`."""

NO_FILE = "no file of this run has a result for it"

_COUNTED = re.compile(r"\d+ skipped: ")


def without_result(claims: Iterable[Claim]) -> list[tuple[str, int]]:
    """Why claims neither passed nor failed: each reason, and of how many claims; the most frequent one first."""
    counts: Counter[str] = Counter()
    for claim in claims:
        if claim.status in (Status.NOT_RUN, Status.NOT_COMPARABLE):
            because = claim.message or (claim.reference if claim.status is Status.NOT_COMPARABLE else NO_FILE)
            said = _COUNTED.sub("", because.split("\n")[0], count=1).removeprefix(f"{claim.status}: ")
            counts[f"{claim.status}: {said}"] += 1
    found = counts.most_common(REASONS)
    if rest := counts.total() - sum(count for _, count in found):
        found.append(("for other reasons: see the list of all checks", rest))
    return found


def plain_number(number: float) -> str:
    """Four digits at most, and no exponent where it can be read without."""
    if not math.isfinite(number):
        return str(number)
    if number == int(number) and abs(number) < 1e6:
        return str(int(number))
    return f"{number:.0f}" if 1000 <= abs(number) < 1e6 else f"{number:.3g}"


@dataclass(frozen=True)
class Place:
    """Where the overview shows the claim: a cell of one of its tables. Columns stand in groups."""

    table: str
    row: str
    group: str
    column: str


@dataclass(frozen=True)
class Claim:
    """One thing that a run can confirm or refute.

    Attributes:
        id: unique and stable: the history is kept under it.
        area: the heading it stands under.
        title: what is claimed, in a few words.
        step: of the ladder, where it is about one.
        label: the guide's own name of the row.
        subject: what exactly was tested (weights, dtype, length): results of other subjects are not compared.
        verified: on what.
        reference: what the value was compared with.
        message: why it does not pass, or a remark.
    """

    id: str
    area: str
    title: str
    status: Status = Status.NOT_RUN
    step: str = ""
    label: str = ""
    subject: str = ""
    verified: Verified = NOT_SAID
    value: Value | None = None
    reference: str = ""
    message: str = ""
    place: Place | None = None

    def check(self) -> None:
        """That every field, which may come from a file, has its type.

        Raises:
            ValueError: naming the claim and the field.
        """
        for field in ("id", "area", "title", "step", "label", "subject", "reference", "message"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{self.id}: {field} is {str(getattr(self, field))[:40]!r} and must be text")
        if self.value is not None and not isinstance(self.value.number, int | float):
            raise ValueError(f"{self.id}: {str(self.value.number)[:40]!r} must be a number")

    @property
    def where(self) -> Where:
        return self.verified.where

    def found(self, status: Status, **facts: Any) -> Claim:
        """The claim with what a run says of it."""
        return replace(self, status=status, **facts)
