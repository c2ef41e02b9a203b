"""The files of a run, found and parsed. A file that cannot be read is a problem of the run, which the page shows."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qwen2_npu.conformance.files import read_json, why
from qwen2_npu.conformance.machine.provenance import Provenance
from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.report import junit

RUN, PREDICTIONS, PAGE, SUMMARY = "run.json", "predictions.json", "index.html", "summary.md"
VERIFY, JUNIT, BENCHMARK, BENCH = "verify*.json", "*.xml", "benchmark*.json", "bench[-.]*json"
"""Names of a run's files, in one folder."""

Content = TypeVar("Content")


@dataclass
class RunInputs:
    """What there is of a run.

    Attributes:
        verifications: name -> what `qwen2-npu verify` wrote.
        sessions: what `pytest --junitxml` wrote.
        benchmarks: name -> what `pytest --benchmark-json` wrote.
        benches: name -> what `qwen2-npu bench --json` wrote.
        run: what `qwen2-npu nightly` wrote of its stages; empty without one.
        predictions: row id -> least and most predicted milliseconds; None without a file.
        problems: files that cannot be read.
    """

    folder: Path
    verifications: dict[str, dict[str, Any]] = field(default_factory=dict)
    sessions: list[junit.Session] = field(default_factory=list)
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    benches: dict[str, dict[str, Any]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, tuple[float, float]] | None = None
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> RunInputs:
        """Everything in ``folder``; an empty or missing one gives inputs without anything.

        Raises:
            OSError: the folder cannot be read.
        """
        found = cls(folder)
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            return found
        except OSError as error:
            message = (
                f"the results folder {folder} cannot be read ({why(error)}): change its permissions, or name another"
            )
            raise type(error)(f"{message} with --results") from error

        def add(pattern: str, read: Callable[[Path], Content], keep: Callable[[str, Content], None]) -> None:
            for name in fnmatch.filter(names, pattern):
                try:
                    keep(name, read(folder / name))
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    found.problems.append(f"{name} cannot be read: {reason(error)}")

        add(VERIFY, _verification, lambda name, content: found.verifications.update({name: content}))
        add(JUNIT, junit.read, lambda name, content: found.sessions.append(content))
        add(BENCHMARK, _benchmark, lambda name, content: found.benchmarks.update({name: content}))
        add(BENCH, _bench, lambda name, content: found.benches.update({name: content}))
        add(RUN, _object, lambda name, content: found.run.update(content))
        add(PREDICTIONS, _predictions, lambda name, content: setattr(found, "predictions", content))
        return found

    def one_by_one(self) -> Iterator[tuple[str, RunInputs, Callable[[], object]]]:
        """Every file's name, inputs that hold it alone, and how to leave it out. For asking each what it can say."""
        if self.run:
            yield RUN, RunInputs(self.folder, run=self.run), self.run.clear
        for session in list(self.sessions):
            alone = RunInputs(self.folder, sessions=[session])
            yield session.path.name, alone, partial(self.sessions.remove, session)
        for kind in ("verifications", "benchmarks", "benches"):
            files: dict[str, dict[str, Any]] = getattr(self, kind)
            for name, content in list(files.items()):
                alone = RunInputs(self.folder)
                getattr(alone, kind)[name] = content
                yield name, alone, partial(files.pop, name)

    def stated(self) -> list[tuple[str, Provenance]]:
        """Each input and the provenance it states; the run's own first, since it speaks for all of them."""
        found = [(RUN, Provenance.from_json(self.run.get("provenance", {})))]
        found += [(session.path.name, Provenance.of_properties(session.properties)) for session in self.sessions]
        found += [(name, Provenance.of_benchmark(content)) for name, content in self.benchmarks.items()]
        found += [(name, Provenance.from_json(content["provenance"])) for name, content in self.benches.items()]
        found += [
            (
                name,
                Provenance(
                    created=text(content["created"]), verified=Verified.read(text(content["environment"]["verified"]))
                ),
            )
            for name, content in self.verifications.items()
        ]
        return found

    def cases(self) -> list[tuple[junit.JUnitCase, Verified]]:
        """Every test case, with what its session was verified on."""
        return [
            (case, Provenance.of_properties(session.properties).verified)
            for session in self.sessions
            for case in session.cases
        ]


def reason(error: Exception) -> str:
    """Why a file cannot be used, in words that need no knowledge of Python."""
    if isinstance(error, OSError):
        return why(error)
    return f"it misses {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def text(value: Any) -> str:
    """``value``, which must be text.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} must be text")
    return value


LARGEST = 1e12
"""Far above every number of a run, and small enough to be drawn."""


def finite(value: Any) -> float:
    """``value``, which must be a number that a chart can show.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"{str(value)[:40]!r} must be a number of at most {LARGEST:g}")
    return value


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def _verification(path: Path) -> dict[str, Any]:
    content = _object(path)
    if content.get("schema") != 1:
        raise ValueError(f"schema {content.get('schema')!r}; this version reads 1: run `qwen2-npu verify` again")
    content["environment"]["verified"], content["rows"], content["created"]
    return content


def _benchmark(path: Path) -> dict[str, Any]:
    content = _object(path)
    content["benchmarks"]
    return content


def _bench(path: Path) -> dict[str, Any]:
    content = _object(path)
    if content.get("schema") != 2:
        raise ValueError(f"schema {content.get('schema')!r}; this version reads 2: run `qwen2-npu bench` again")
    if not content["results"]:
        raise ValueError("it holds no results")
    content["provenance"]["verified"]
    return content


def _predictions(path: Path) -> dict[str, tuple[float, float]]:
    return {text(one["row_id"]): (finite(one["low_ms"]), finite(one["high_ms"])) for one in read_json(path)}
