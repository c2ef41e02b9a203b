"""Latencies recorded on the user's own machine: one file per fingerprint, written only on request, nothing forgotten.

    baselines/recorded/<fingerprint>/latency.json

A row's baseline is the runs that were recorded for one reason: ``--update-baselines=REASON`` with the same words adds
a run (five make a margin), with other words starts a new baseline and moves the old one, whole, into the row's
history. A run that lies outside the margin of the runs before it is not of their kind and is refused under their
reason: no baseline drifts.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from qwen2_npu.conformance.files import write_json
from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.perf.documented import BaselineError
from qwen2_npu.conformance.perf.measurement import Measurement, Summary
from qwen2_npu.conformance.perf.prediction_interval import MINIMUM_RUNS, Interval, prediction_interval
from qwen2_npu.conformance.perf.rows import Row

FOLDER, FILE = "recorded", "latency.json"

STATISTICS = ("median", "mean")
"""What is compared, each with its own margin: the median is calm, the mean sees stalls that the median does not."""


@dataclass(frozen=True)
class Baseline:
    """The runs recorded for one row under one reason.

    Attributes:
        protocol: input tokens, decode steps and weights: a run of another protocol is another quantity.
    """

    row_id: str
    reason: str
    protocol: Mapping[str, Any]
    runs: tuple[Summary, ...]

    @property
    def complete(self) -> bool:
        return len(self.runs) >= MINIMUM_RUNS

    def interval(self, statistic: str) -> Interval:
        """See :mod:`margin`.

        Raises:
            ValueError: too few runs, or placeholders among them.
        """
        return prediction_interval([getattr(run, statistic) for run in self.runs])


def protocol(measurement: Measurement) -> dict[str, Any]:
    """What must be the same for two measurements of a row to be compared."""
    return {
        "input_tokens": measurement.input_tokens,
        "decode_steps": measurement.asked_steps,
        "weights": measurement.weights,
    }


class Recorded:
    """The recorded baselines of one fingerprint.

    Args:
        folder: of all baselines; the repository's ``baselines``.
        fingerprint: of the machine that compares or records.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        self.root = folder / FOLDER
        self.fingerprint = fingerprint
        self.path = self.root / fingerprint.name / FILE

    def baseline(self, row: Row) -> Baseline | None:
        """What is recorded for ``row`` on this very machine; None where nothing is.

        Raises:
            BaselineError: the file is damaged, edited by hand, or of another fingerprint.
        """
        entry = self._rows().get(row.id)
        return None if entry is None else _baseline(row.id, entry)

    def elsewhere(self, row: Row) -> list[str]:
        """Which other fingerprints hold the row, and how they differ: for messages, never for a comparison."""
        found = []
        for path in sorted(self.root.glob(f"*/{FILE}")):
            if path == self.path:
                continue
            try:
                content = _load(path)
            except BaselineError as error:
                found.append(str(error))
                continue
            entry = content["rows"].get(row.id)
            if entry is not None:
                other = Fingerprint.read(content["fingerprint"])
                medians = ", ".join(f"{run['median']:.4g}" for run in entry["runs"])
                differing = "; ".join(other.differences(self.fingerprint))
                found.append(f"{other.name} has {medians} ms and differs in {differing}")
        return found

    def record(self, row: Row, measurement: Measurement, reason: str, provenance: Mapping[str, Any]) -> Baseline:
        """Add one run, and write the file whole.

        Raises:
            BaselineError: a self-test or a faulty measurement, no reason, or a run that does not fit those recorded
                under this reason.
            OSError: the file cannot be written; it is then as it was.
        """
        if measurement.self_test:
            raise BaselineError(f"{row.id}: a self-test's latencies are injected and are never recorded")
        faults = [*measurement.faults(), *measurement.warnings]
        if faults:
            raise BaselineError(f"{row.id} is not recorded: {'; '.join(faults)}")
        if not reason.strip():
            raise BaselineError("--update-baselines needs a reason: it is kept with the numbers")
        summary = Summary.of(measurement.samples(row.phase))
        run = {
            **asdict(summary),
            "samples": len(measurement.samples(row.phase)),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "fingerprint": self.fingerprint.digest,
            **provenance,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            rows = self._rows()
            rows[row.id] = _extended(row.id, rows.get(row.id), reason.strip(), protocol(measurement), run)
            content: dict[str, Any] = {"fingerprint": dict(self.fingerprint.identity), "rows": rows}
            write_json(self.path, {**content, "digest": _digest(content)})
        return _baseline(row.id, rows[row.id])

    def _rows(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        return dict(_load(self.path)["rows"])


def _load(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        inner = Fingerprint.read(content["fingerprint"])
        digest = _digest({"fingerprint": content["fingerprint"], "rows": content["rows"]})
        foreign = {
            run["fingerprint"]
            for entry in content["rows"].values()
            for run in entry["runs"]
            if run["fingerprint"] != inner.digest
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaselineError(f"{path} is damaged ({error!r}): take it from version control, or delete it") from error
    copied = "copied from another machine. Delete it, and record here with --update-baselines=REASON"
    if inner.name != path.parent.name:
        raise BaselineError(f"{path} holds the fingerprint {inner.name}: {copied}")
    if foreign:
        runs = f"runs of fingerprint {', '.join(sorted(foreign))}"
        raise BaselineError(f"{path} holds {runs} in the file of {inner.digest}: {copied}")
    if digest != content.get("digest"):
        raise BaselineError(
            f"{path} was changed by hand or by a merge: its digest does not fit. Take it from version control, or "
            "record again with --update-baselines=REASON"
        )
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _baseline(row_id: str, entry: dict[str, Any]) -> Baseline:
    runs = tuple(Summary(run["mean"], run["median"], run["p99"]) for run in entry["runs"])
    return Baseline(row_id, entry["reason"], entry["protocol"], runs)


def _extended(
    row_id: str, entry: dict[str, Any] | None, reason: str, wanted: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """The entry with one more run: of the same baseline, or the first of a new one with the old in its history."""
    if entry is None:
        return {"reason": reason, "protocol": wanted, "runs": [run], "history": []}
    if entry["reason"] == reason and entry["protocol"] == wanted:
        baseline = _baseline(row_id, entry)
        outside = []
        if baseline.complete:
            for statistic in STATISTICS:
                interval = baseline.interval(statistic)
                if not interval.low <= run[statistic] <= interval.high:
                    outside.append(
                        f"{statistic} {run[statistic]:.4g} ms, {interval.low:.4g} to {interval.high:.4g} expected"
                    )
        if outside:
            raise BaselineError(
                f"{row_id}: this run is not of the {len(baseline.runs)} recorded for {reason!r} "
                f"({'; '.join(outside)}): find out why, or give a new reason to --update-baselines, which starts a "
                "new baseline"
            )
        return {**entry, "runs": [*entry["runs"], run]}
    old = {key: value for key, value in entry.items() if key != "history"}
    return {
        "reason": reason,
        "protocol": wanted,
        "runs": [run],
        "history": [*entry["history"], {**old, "replaced": run["date"], "replaced_for": reason}],
    }
