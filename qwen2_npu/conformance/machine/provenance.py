"""Of which commit, on what, and when: what a result must say of itself before it can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from qwen2_npu.conformance.machine import fingerprint
from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.machine.verified import NOT_SAID, Verified

PREFIX = "qwen2_npu."
"""Of the properties in JUnit files."""


_NAMES = {str: "text", bool: "true or false", Mapping: "an object"}


@dataclass(frozen=True)
class Provenance:
    """None or empty is what nothing said."""

    commit: str | None = None
    dirty: bool | None = None
    created: str = ""
    verified: Verified = NOT_SAID
    fingerprint: Fingerprint = field(default_factory=lambda: Fingerprint.read({}))

    @classmethod
    def of_device(cls, device: str) -> Provenance:
        """Of this checkout, now, on ``device``. Imports torch for anything but a CPU."""
        commit = fingerprint.commit()
        return cls(
            commit=commit["commit"],
            dirty=commit["dirty"],
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            verified=Verified.on(device),
            fingerprint=fingerprint.of_device(device),
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        """The fingerprint's."""
        return self.fingerprint.identity

    def to_json(self) -> dict[str, Any]:
        """Plain values; see :meth:`from_json`."""
        return {
            "commit": self.commit,
            "dirty": self.dirty,
            "created": self.created,
            "verified": self.verified.text,
            "identity": dict(self.identity),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        """The reverse of :meth:`to_json`; what is missing stays unsaid.

        Raises:
            ValueError: a value of the wrong type.
        """
        for name, kind in (
            ("commit", str),
            ("created", str),
            ("verified", str),
            ("dirty", bool),
            ("identity", Mapping),
        ):
            value = data.get(name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} is {str(value)[:40]!r} and must be {_NAMES[kind]}")
        return cls(
            commit=data.get("commit"),
            dirty=data.get("dirty"),
            created=data.get("created") or "",
            verified=Verified.read(data.get("verified")),
            fingerprint=Fingerprint.read(data.get("identity") or {}),
        )

    def properties(self) -> dict[str, str]:
        """As a JUnit file holds it."""
        return {f"{PREFIX}{name}": json.dumps(value, ensure_ascii=False) for name, value in self.to_json().items()}

    @classmethod
    def of_properties(cls, properties: Mapping[str, str]) -> Provenance:
        """The reverse of :meth:`properties`."""
        ours = {name.removeprefix(PREFIX): value for name, value in properties.items() if name.startswith(PREFIX)}
        return cls.from_json({name: json.loads(value) for name, value in ours.items()})

    @classmethod
    def of_benchmark(cls, content: Mapping[str, Any]) -> Provenance:
        """What pytest-benchmark's JSON says, with what the latency gate adds to it."""
        commit, ours = content.get("commit_info") or {}, content.get("machine_info", {}).get("qwen2_npu", {})
        known = commit.get("id") not in (None, "unknown", "unversioned")
        identity = ours.get("identity") or {}
        return cls.from_json(
            {
                "commit": commit["id"] if known else None,
                "dirty": commit.get("dirty") if known else None,
                "created": content.get("datetime"),
                "verified": identity.get("verified"),
                "identity": identity,
            }
        )


def merged(stated: Iterable[tuple[str, Provenance]]) -> tuple[Provenance, list[str]]:
    """One provenance for a run whose inputs each say theirs, and every contradiction.

    Args:
        stated: name of an input, and what it says; the first that says something is believed.
    """
    known = [(name, provenance) for name, provenance in stated if provenance != Provenance()]
    result: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    problems = []
    for name, provenance in known:
        for key, value in provenance.to_json().items():
            if value in (None, "", {}):
                continue
            if key not in result:
                result[key], said_by[key] = value, name
            elif key == "commit" and value != result[key]:
                problems.append(
                    f"{name} is of commit {value[:12]}, {said_by[key]} of {result[key][:12]}: "
                    "one page shows one commit; run both again"
                )
    return Provenance.from_json(result), problems
