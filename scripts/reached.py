"""Which tests reach which lines of the library, and how long they take: for ``mutants.py``, recorded once by coverage.

A test's context is its id. Processes that a test starts are recorded, too, under the id that they inherit. What is
reached while nothing but imports run belongs to no test.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

FAST_LANE = ("-m", "not slow")
TEST = "QWEN2_NPU_MUTANTS_TEST"
"""Environment variable with the id of the running test, for the processes that it starts."""

CONFIGURATION = """[run]
include =
{include}
context = ${{{test}}}
parallel = True
data_file = {data}
disable_warnings = no-data-collected, couldnt-parse, module-not-measured
"""


@dataclass
class Record:
    """What one run of the tests reached.

    Attributes:
        tests: ids of those that passed, in the order of the run.
        seconds: what each of them took.
        lines: path -> line -> set of tests, bit N for ``tests[N]``.
        imported: path -> lines that run without any test, when the file is imported.
        modules: what was imported at the end, in that order.
        sources: path -> hash of the file that was recorded.
    """

    tests: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lines: dict[str, dict[int, int]] = field(default_factory=dict)
    imported: dict[str, list[int]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def reaching(self, path: str, lines: Sequence[int]) -> list[int]:
        """Indexes of the tests that reach one of the lines."""
        known = self.lines.get(path, {})
        bits = 0
        for line in lines:
            bits |= known.get(line, 0)
        return [index for index, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]

    @functools.cached_property
    def files(self) -> list[str]:
        """Of each test."""
        return [test.partition("::")[0] for test in self.tests]

    def save(self, file: Path) -> None:
        content = {each.name: getattr(self, each.name) for each in fields(self)} | {
            "lines": {p: {str(line): f"{bits:x}" for line, bits in found.items()} for p, found in self.lines.items()}
        }
        with gzip.open(file, "wt", encoding="utf-8") as out:
            json.dump(content, out)

    @classmethod
    def load(cls, file: Path) -> Record:
        with gzip.open(file, "rt", encoding="utf-8") as text:
            content = json.load(text)
        content["lines"] = {
            path: {int(line): int(bits, 16) for line, bits in found.items()} for path, found in content["lines"].items()
        }
        return cls(**content)


def hash_of(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


class Recorder:
    """The plugin of the run: contexts, times, and what failed."""

    def __init__(self, result: Path, minutes: float) -> None:
        self.result, self.ends = result, time.monotonic() + 60 * minutes
        self.seconds: dict[str, float] = {}
        self.not_passed: set[str] = set()

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        import coverage

        measured = coverage.Coverage.current()
        assert measured is not None
        measured.switch_context(item.nodeid)
        os.environ[TEST] = item.nodeid
        started = time.perf_counter()
        yield
        self.seconds[item.nodeid] = time.perf_counter() - started
        measured.switch_context("")
        if time.monotonic() > self.ends:
            item.session.shouldstop = "no time is left"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:  # skipped and expected failures notice nothing
            self.not_passed.add(report.nodeid)

    def pytest_unconfigure(self) -> None:
        passed = {test: seconds for test, seconds in self.seconds.items() if test not in self.not_passed}
        modules = [name for name, module in list(sys.modules.items()) if module is not None]
        content = {"seconds": passed, "modules": modules, "not_passed": sorted(self.not_passed)}
        self.result.write_text(json.dumps(content), encoding="utf-8")


def record(
    folder: Path, files: Sequence[str], tests: Sequence[str], work: Path, minutes: float | None = None
) -> Record:
    """Run the tests in the copy ``folder``.

    Args:
        files: what is watched, relative to the folder.
        tests: arguments of pytest beside those of the fast lane; none: all of them.
        work: an empty folder for coverage's data.
        minutes: no test is begun later: what it would reach is not known then.
    """
    configuration, data, result = work / "coverage.ini", work / "data", work / "tests.json"
    include = "\n".join(f"    {folder / file}" for file in files)
    configuration.write_text(CONFIGURATION.format(include=include, test=TEST, data=data), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", TEST: ""}
    environment["COVERAGE_PROCESS_START"] = str(configuration)
    limit = str(math.inf if minutes is None else minutes)
    command = [sys.executable, __file__, str(result), limit, *FAST_LANE, "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if not result.exists():
        raise SystemExit(f"the tests cannot be recorded: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads(result.read_text(encoding="utf-8"))
    return _read(folder, files, found, data)


def _read(folder: Path, files: Sequence[str], found: dict[str, Any], data: Path) -> Record:
    import coverage

    measured = coverage.Coverage(data_file=str(data), config_file=False)
    measured.combine(strict=True, keep=True)
    lines = measured.get_data()
    index = {test: number for number, test in enumerate(found["seconds"])}
    made = Record(list(index), list(found["seconds"].values()), modules=found["modules"])
    for file in files:
        made.sources[file] = hash_of((folder / file).read_bytes())
        made.lines[file], made.imported[file] = {}, []
        for line, contexts in lines.contexts_by_lineno(str(folder / file)).items():
            made.lines[file][line] = sum(1 << index[test] for test in set(contexts) if test in index)
            if "" in contexts:
                made.imported[file].append(line)
    return made


if __name__ == "__main__":
    raise SystemExit(pytest.main(sys.argv[3:], plugins=[Recorder(Path(sys.argv[1]).resolve(), float(sys.argv[2]))]))
