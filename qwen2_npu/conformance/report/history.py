"""Earlier runs: one file each, written whole, never changed.

    history/<date>-<commit>-<fingerprint>.json

Only runs of the same fingerprint are compared; the page lists the others.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.files import read_json, why, write_json
from qwen2_npu.conformance.machine.provenance import Provenance
from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.report.claims import Claim, Status, Value
from qwen2_npu.conformance.report.inputs import reason, text
from qwen2_npu.conformance.report.results import Results

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """One claim as an earlier run had it."""

    status: Status
    verified: Verified
    subject: str
    value: Value | None

    @classmethod
    def of(cls, claim: Claim) -> Entry:
        return cls(claim.status, claim.verified, claim.subject, claim.value)


@dataclass(frozen=True)
class Run:
    """An earlier run, or this one in the form it will be remembered in."""

    provenance: Provenance
    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, results: Results) -> Run:
        """What is kept of ``results``: what was run."""
        said = {claim.id: Entry.of(claim) for claim in results.claims if claim.status is not Status.NOT_RUN}
        return cls(results.provenance, said)

    @property
    def name(self) -> str:
        """Of its file; sorts by date."""
        made = re.sub(r"[^0-9T]", "", self.provenance.created[:19])
        # A commit comes from a file: it must not lead out of the folder.
        commit = re.sub(r"[^0-9A-Za-z]", "", self.provenance.commit or "")[:12] or "unknown"
        return f"{made}-{commit}-{self.digest}"

    @property
    def digest(self) -> str:
        return self.provenance.fingerprint.digest

    @property
    def commit(self) -> str:
        """As people read it."""
        if not self.provenance.commit:
            return "unknown"
        return self.provenance.commit[:10] + ("+changes" if self.provenance.dirty else "")

    @property
    def date(self) -> str:
        return self.provenance.created[:10]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "provenance": self.provenance.to_json(),
            "claims": {id: _entry_to_json(entry) for id, entry in self.entries.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """The reverse of :meth:`to_json`.

        Raises:
            ValueError: another schema, or a value of the wrong type.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema {data.get('schema')!r}, this version reads {SCHEMA}")
        entries = {id: _entry_from_json(entry) for id, entry in data["claims"].items()}
        return cls(Provenance.from_json(data["provenance"]), entries)


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    value = entry.value
    return {
        "status": str(entry.status),
        "verified": entry.verified.text,
        "subject": entry.subject,
        "value": None if value is None else [value.number, value.unit, value.lower_is_better],
    }


def _entry_from_json(data: Mapping[str, Any]) -> Entry:
    value = data["value"]
    return Entry(
        Status(data["status"]),
        Verified.read(text(data["verified"])),
        text(data["subject"]),
        None if value is None else Value(float(value[0]), text(value[1]), bool(value[2])),  # "nan" is a string in JSON
    )


def load(folder: Path) -> tuple[list[Run], list[str]]:
    """All runs, oldest first, and the files that could not be read."""
    runs: list[Run] = []
    problems: list[str] = []
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return runs, problems
    except OSError as error:
        return runs, [f"the history folder {folder} cannot be read ({why(error)}): nothing is compared with it"]
    for name in fnmatch.filter(names, "[!.]*.json"):
        try:
            runs.append(Run.from_json(read_json(folder / name)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            problems.append(f"history: {name} cannot be read ({reason(error)}): it is left out")
    return sorted(runs, key=lambda run: run.provenance.created), problems


def append(folder: Path, results: Results) -> Path:
    """Add this run to the history. Doing it twice leaves one file.

    Several processes may do it at once: each run has a file of its own, which is whole or absent.

    Raises:
        ValueError: the run cannot be compared with others: its commit or machine is not known, or it is a self-test.
        OSError: the folder cannot be written.
    """
    reasons = list(_not_to_remember(results))
    if reasons:
        raise ValueError(f"not added to the history: {'; '.join(reasons)}")
    run = Run.of(results)
    path = folder / f"{run.name}.json"
    write_json(path, run.to_json())
    return path


def _not_to_remember(results: Results) -> Iterator[str]:
    if results.self_test:
        yield "its latencies were injected (a self-test)"
    provenance = results.provenance
    for what in ("commit", "created", "identity"):
        if not getattr(provenance, what):
            yield f"no file of this run states its {what}; use `qwen2-npu nightly`, which writes run.json"
    yield from (problem for problem in results.problems if " is of commit " in problem)
    if all(claim.status is Status.NOT_RUN for claim in results.claims):
        yield "nothing was run"
