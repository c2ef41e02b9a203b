"""The documented numbers as pytest-benchmark's file, for ``--benchmark-compare`` and ``pytest-benchmark compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.files import write_json
from qwen2_npu.conformance.perf.documented import BASELINES, BaselineError, Documented

FILE = "0001_documented.json"
"""In the storage root: pytest-benchmark finds it there on every machine."""

MARK = "qwen2_npu_documented"
"""Key of machine_info that says: no run of pytest-benchmark made this file."""


def content(numbers: Sequence[Documented]) -> dict[str, Any]:
    """The file. Reproducible: the same source gives the same bytes."""
    conditions = numbers[0].conditions
    return {
        "machine_info": {
            MARK: True,
            "node": f"{conditions.machine} (SKU {conditions.sku})",
            "processor": conditions.host,
            "machine": conditions.host,
            "python_implementation": "unknown",
            "python_version": "unknown",
            "system": "Linux",
            "cpu": {},
        },
        "commit_info": {"id": "unversioned", "time": None, "author_time": None, "dirty": False, "project": "torchair"},
        "benchmarks": [_benchmark(number) for number in numbers],
        "datetime": "2024-08-20T00:00:00+00:00",  # of the newest table; the others say no date
        "version": "5.3.1",
    }


def _benchmark(number: Documented) -> dict[str, Any]:
    row, conditions = number.row, number.conditions
    return {
        "group": group(row.configuration.model, row.phase),
        "name": row.node_id.rpartition("::")[2],
        "fullname": row.node_id,
        "params": {"row_id": row.id},
        "param": row.id,
        "extra_info": {
            "documented": True,
            "table": number.row.table,
            "title": number.title,
            "label": number.label,
            "note": number.note,
            **asdict(row.configuration),
            "phase": row.phase,
            "ms": number.ms,
            "versions": dict(number.versions),
            **asdict(conditions),
        },
        "options": {},
        "stats": _stats(number.ms / 1e3, 1 if row.phase == "prefill" else conditions.decode_steps),
    }


def _stats(seconds: float, rounds: int) -> dict[str, Any]:
    """One number is all a table gives: no spread, and nothing may be gated on one."""
    same = dict.fromkeys(("min", "max", "mean", "median", "q1", "q3", "ld15iqr", "hd15iqr"), seconds)
    none = dict.fromkeys(("stddev", "iqr", "iqr_outliers", "stddev_outliers"), 0)
    return {
        **same,
        **none,
        "rounds": rounds,
        "iterations": 1,
        "outliers": "0;0",
        "ops": 1 / seconds,
        "total": seconds * rounds,
    }


def group(model: str, phase: str) -> str:
    """pytest-benchmark's group: what is drawn in one table."""
    return f"{model} {phase}"


def write(numbers: Sequence[Documented], folder: Path = BASELINES) -> Path:
    """Write the file, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / FILE
    write_json(path, content(numbers))
    return path


def check(numbers: Sequence[Documented], folder: Path = BASELINES) -> None:
    """The file agrees with the source in every number.

    Raises:
        BaselineError: it is missing, damaged or different; names the first rows that differ.
    """
    path = folder / FILE
    way_out = "make it again with `qwen2-npu baselines --write`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaselineError(f"{path}: {error}; {way_out}") from error
    wanted = json.loads(json.dumps(content(numbers)))
    if found == wanted:
        return
    ours = {bench["param"]: bench for bench in wanted["benchmarks"]}
    theirs = {bench.get("param"): bench for bench in found.get("benchmarks", [])}
    differing = [str(name) for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    what = f"rows {', '.join(differing[:4])}{', …' if len(differing) > 4 else ''}" if differing else "its header"
    raise BaselineError(f"{path} does not agree with the documented numbers in {what}; {way_out}")
