"""The guide's 76 numbers, read from ``baselines/documented.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import qwen2_npu
from qwen2_npu.conformance.perf.rows import MODES, ORIGINAL, PHASES, Configuration, Mode, Phase, Row
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import LADDER

BASELINES = Path(qwen2_npu.__file__).parents[1] / "baselines"
"""The repository's folder of baselines; it is no part of an installed wheel."""

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
        raise BaselineError(f"{path} is no valid TOML: {error}") from error
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
                raise BaselineError(f"{place}: column {column!r} is none of MODE-PHASE")
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
