"""Faults in the model, the cache, checkpoints, operators and graphs: which of them, by which tests.

There are thousands, and thousands of tests: a test is run against a fault only if it reaches the fault's line
(``reached.py``), and a run takes one part of the faults.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lane import Work, index_of, outer_functions
from mutations import Mutation, parsed
from reached import Record

TABLE = Path("scripts", "library.toml")

QUICK = 0.05
"""Seconds: unit tests of the same folder that take no longer go first, with whatever parameters."""


@dataclass(frozen=True)
class Library:
    """The table: ``files`` are patterns, ``equal`` has path -> name of a fault -> why no test can notice it."""

    files: tuple[str, ...]
    equal: dict[str, dict[str, str]]

    @classmethod
    def load(cls, root: Path) -> Library:
        if not (root / TABLE).exists():
            return cls((), {})
        content = tomllib.loads((root / TABLE).read_text(encoding="utf-8"))
        return cls(tuple(content["files"]), content.get("equal", {}))

    def paths(self, root: Path) -> list[str]:
        found = {path.relative_to(root).as_posix() for pattern in self.files for path in root.glob(pattern)}
        return sorted(found)


# ---- tests for a fault ----------------------------------------------------------------------------------------------
def lines_of(source: bytes, mutation: Mutation) -> list[int]:
    """The lines of the statement that has the fault: of ``if``, ``for`` and the like up to their bodies."""
    line = mutation.line
    around = [
        node
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    if not around:
        return [line]
    inner = max(around, key=lambda node: (node.lineno, -(node.end_lineno or 0)))
    body = getattr(inner, "body", None)
    last = max(inner.lineno, body[0].lineno - 1) if isinstance(body, list) else inner.end_lineno or inner.lineno
    return list(range(inner.lineno, last + 1))


def needs_import(source: bytes, mutation: Mutation, imported: Sequence[int]) -> bool:
    """Whether the fault acts while modules are imported: then it takes a new interpreter."""
    index = index_of(source, mutation)
    if index is None:
        return True
    function = outer_functions(parsed(source))[index]
    inside = range(function.body[0].lineno, (function.end_lineno or function.lineno) + 1)
    return any(line in inside for line in imported)


@functools.cache
def nearness(path: str, file: str) -> int:
    """0 for the unit tests of the file, 1 for those of its folder, 2 for the rest."""
    parts = Path(path).with_suffix("").parts[1:]
    folder = "/".join(("tests", "unit", *parts[:-1]))
    if fnmatch.fnmatch(file, f"{folder}/test_{parts[-1]}*.py"):
        return 0
    return 1 if len(parts) > 1 and file.startswith(f"{folder}/") else 2


def chosen(path: str, source: bytes, mutation: Mutation, record: Record, budget: float) -> list[int]:
    """Tests to run against a fault, as indexes of the record, in that order, of ``budget`` recorded seconds together.

    Those that reach its statement, or any function of the file where it is in none; then others of their files, for
    what a fixture or a cache keeps is built by the first test alone. One of each function goes before its siblings
    with other parameters, unless they are quick, near files before others, short ones before long ones.
    """
    if index_of(source, mutation) is None:
        lines = [
            line
            for function in outer_functions(parsed(source))
            for line in range(function.body[0].lineno, (function.end_lineno or function.lineno) + 1)
        ]
    else:
        lines = lines_of(source, mutation)
    reaching = record.reaching(path, lines)
    reached = set(reaching)
    files = {record.files[index] for index in reaching}
    near = {file: nearness(path, file) for file in set(record.files)}
    # What runs at import alone, such as a table in an __init__.py, is reached by no test: those of its folder, then.
    files |= {file for file, distance in near.items() if distance <= (0 if reaching else 1)}
    beside = [i for i, file in enumerate(record.files) if file in files and i not in reached]
    ordered = _ordered(path, reaching, record) + _ordered(path, beside, record)
    taken, spent = [], 0.0
    for index in ordered:
        if spent + record.seconds[index] <= budget:
            spent += record.seconds[index]
            taken.append(index)
    return taken


def _ordered(path: str, tests: Sequence[int], record: Record) -> list[int]:
    seen: set[str] = set()
    passes: dict[int, bool] = {}
    for index in sorted(tests, key=lambda index: record.seconds[index]):
        function = record.tests[index].partition("[")[0]
        quick = record.seconds[index] < QUICK and nearness(path, record.files[index]) < 2
        passes[index] = function in seen and not quick
        seen.add(function)
    totals: dict[tuple[bool, str], float] = defaultdict(float)
    for index in tests:
        totals[passes[index], record.files[index]] += record.seconds[index]

    def key(index: int) -> tuple[bool, int, float, str, float]:
        file = record.files[index]
        near = nearness(path, file)
        return passes[index], near, totals[passes[index], file], file, record.seconds[index]

    return sorted(tests, key=key)


def work_for(path: str, source: bytes, wanted: Sequence[Mutation], record: Record, budget: float) -> list[Work]:
    imported = record.imported.get(path, ())
    return [
        Work(path, m.name, chosen(path, source, m, record, budget), needs_import(source, m, imported)) for m in wanted
    ]
