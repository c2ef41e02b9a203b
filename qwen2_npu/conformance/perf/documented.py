"""The guide's 76 numbers, read from ``baselines/documented.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from qwen2_npu.conformance.files import BASELINES
from qwen2_npu.conformance.perf.rows import MODES, Configuration, Mode, Row
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import LADDER, ORIGINAL, PHASES, Phase

SOURCE = "documented.toml"


class BaselineError(ValueError):
    """A baseline is missing, damaged, or not what it says it is."""


@dataclass(frozen=True)
class Conditions:
    """Under which the guide measured all rows.

    Attributes:
        rounding: milliseconds that printing whole ones leaves open, each way.
    """

    machine: str
    sku: str
    host: str
    dtype: str
    input_tokens: int
    output_tokens: int
    unit: str
    rounding: float
    source: str

    @property
    def decode_steps(self) -> int:
        """Steps after the first, whose mean is the decode latency."""
        return self.output_tokens - 1


@dataclass(frozen=True)
class Documented:
    """One number of the guide.

    Attributes:
        ms: as printed there.
        label: the row's own name in its table.
        versions: package -> version it was measured with.
    """

    row: Row
    ms: float
    label: str
    title: str
    note: str
    versions: Mapping[str, str]
    conditions: Conditions


@dataclass(frozen=True)
class Measured:
    """What was measured, in all that decides whether a documented number may stand beside it, the machine aside.

    Attributes:
        decode_steps: after the first.
        transformers: the installed version.
    """

    configuration: Configuration
    phase: Phase
    dtype: str
    input_tokens: int
    decode_steps: int
    transformers: str


def stock_name(transformers: str) -> str:
    """What the stock model of another version than the documented one is called: ``stock-5.x``."""
    major = transformers.partition(".")[0]
    return f"stock-{major if major.isdigit() else '?'}.x"


def other_stock(number: Documented, transformers: str) -> str:
    """Why the stock model that is installed is not the one of ``number``; empty for all other steps."""
    wanted = number.versions["transformers"]
    # 4.37.2 changed nothing in the model of 4.37.0.
    if number.row.configuration.step != ORIGINAL or transformers.split(".")[:2] == wanted.split(".")[:2]:
        return ""
    return (
        f"the documented {number.ms:.0f} ms are of the model of transformers {wanted}, and {transformers} is installed"
    )


def why_not(number: Documented, measured: Measured) -> str:
    """Why ``measured`` may not be held against ``number``; empty where it may. ``machine.not_comparable`` asks for the
    machine.

    More decode steps than documented are more work, so what passes with them passes; fewer are less.
    """
    conditions = number.conditions
    if (number.row.configuration, number.row.phase) != (measured.configuration, measured.phase):
        return f"row {number.row.id} is of {number.row.configuration}, {number.row.phase}"
    if reason := other_stock(number, measured.transformers):
        return reason
    if measured.dtype != conditions.dtype:
        return f"documented in {conditions.dtype}, measured in {measured.dtype}"
    if measured.input_tokens != conditions.input_tokens:
        return f"documented for {conditions.input_tokens} tokens, measured with {measured.input_tokens}"
    if measured.phase == "decode" and measured.decode_steps < conditions.decode_steps:
        return f"documented for {conditions.decode_steps} decode steps, measured in {measured.decode_steps}"
    return ""


def why_not_row(number: Documented, input_tokens: int, decode_steps: int, transformers: str) -> str:
    """:func:`why_not` of the latency suite's own measurement of the row, which it makes in the documented dtype."""
    row, dtype = number.row, number.conditions.dtype
    return why_not(number, Measured(row.configuration, row.phase, dtype, input_tokens, decode_steps, transformers))


def find(measured: Measured) -> tuple[Documented | None, str]:
    """The number that ``measured`` may be held against, or why it may not: empty where no row is of its configuration,
    or where the tables are not installed.

    Raises:
        BaselineError: the source is damaged.
    """
    reasons = []
    for number in read() if is_here() else ():
        if (number.row.configuration, number.row.phase) == (measured.configuration, measured.phase):
            reason = why_not(number, measured)
            if not reason:
                return number, ""
            reasons.append(reason)
    return None, reasons[0] if reasons else ""


def is_here() -> bool:
    """Whether there are tables: an installed wheel has none."""
    return (BASELINES / SOURCE).exists()


def read(path: Path | None = None) -> tuple[Documented, ...]:
    """Every documented number, in the guide's order.

    Args:
        path: the source; default: the repository's.

    Raises:
        BaselineError: no such file, damaged, incomplete, or with a number that could not be a latency.
    """
    return _read(path or BASELINES / SOURCE)


@cache
def _read(path: Path) -> tuple[Documented, ...]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaselineError(
            f"{path}: {error.strerror}; the documented baselines are in the repository's folder baselines/, "
            "so run from a checkout (pip install -e .)"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BaselineError(f"{path} is not valid TOML: {error}") from error
    try:
        conditions = Conditions(**content["conditions"])
        numbers = [number for table in content["tables"] for number in _table(table, conditions)]
        declared = content["numbers"]
    except (KeyError, TypeError) as error:
        raise BaselineError(f"{path}: {type(error).__name__}: {error}; compare it with the committed one") from error
    ids = [number.row.id for number in numbers]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise BaselineError(f"{path}: {', '.join(twice)} is there twice")
    if len(numbers) != declared:
        raise BaselineError(f"{path} holds {len(numbers)} numbers and declares {declared}: some are missing or added")
    return tuple(numbers)


def _table(table: dict[str, Any], conditions: Conditions) -> list[Documented]:
    found = []
    for line in table["rows"]:
        step, batch = line.get("step", table.get("step")), line.get("batch", table.get("batch"))
        place = f"table {table['name']}, row {line['label']}"
        if step not in (ORIGINAL, *LADDER):
            raise BaselineError(f"{place}: no step {step!r}; there are {ORIGINAL}, {', '.join(LADDER)}")
        if table["model"] not in SIZES:
            raise BaselineError(f"{place}: no model {table['model']!r}; there are {', '.join(SIZES)}")
        if len(line["ms"]) != len(table["columns"]):
            raise BaselineError(f"{place} has {len(line['ms'])} numbers for {len(table['columns'])} columns")
        for column, ms in zip(table["columns"], line["ms"], strict=True):
            mode, _, phase = column.partition("-")
            if mode not in MODES or phase not in PHASES:
                raise BaselineError(f"{place}: column {column!r} is not MODE-PHASE")
            if type(ms) is not int or ms <= 1:
                raise BaselineError(f"{place}: {ms!r} ms is a placeholder; the tables hold whole milliseconds above 1")
            configuration = Configuration(table["model"], table["cards"], batch, cast(Mode, mode), step)
            found.append(
                Documented(
                    row=Row(table["name"], configuration, cast(Phase, phase)),
                    ms=float(ms),
                    label=line["label"],
                    title=table["title"],
                    note=line.get("note", table.get("note", "")),
                    versions=table["versions"],
                    conditions=conditions,
                )
            )
    return found


def by_id(path: Path | None = None) -> dict[str, Documented]:
    """Row id -> documented number."""
    return {number.row.id: number for number in read(path)}
