"""The store of recorded baselines: whole files, history, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.perf.documented import BaselineError, read
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.recorded import Recorded
from tests.perf.fake_runner import measurement_of

ROW = read()[1].row
HERE, THERE = (
    Fingerprint.read({"soc": "Ascend910B4", "cann": "8.5.0"}),
    Fingerprint.read({"soc": "Ascend910B4", "cann": "8.6.0"}),
)
COMMIT = {"commit": "abc", "dirty": False}
RUNS = (50.0, 50.2, 49.9, 50.1, 49.8)


def measured(decode_ms: float, **changes: Any) -> Measurement:
    return replace(measurement_of({"prefill": 100.0, "decode": decode_ms}), self_test=False, **changes)


def recorded(folder: Path, fingerprint: Fingerprint = HERE, runs: tuple[float, ...] = RUNS) -> Recorded:
    store = Recorded(folder, fingerprint)
    for ms in runs:
        store.record(ROW, measured(ms), "first", COMMIT)
    return store


def test_runs_add_up_to_a_baseline_with_their_provenance(tmp_path: Path) -> None:
    store = recorded(tmp_path, runs=RUNS[:4])
    four = store.baseline(ROW)
    assert four is not None
    assert not four.complete
    store.record(ROW, measured(RUNS[4]), "first", COMMIT)
    five = Recorded(tmp_path, HERE).baseline(ROW)
    assert five is not None
    assert five.complete
    assert five.interval("median").low < 50.0 < five.interval("median").high
    run = json.loads(store.path.read_text())["rows"][ROW.id]["runs"][0]
    assert (run["commit"], run["fingerprint"], run["samples"]) == ("abc", HERE.digest, 1023)
    assert run["date"].endswith("+00:00")


def test_a_new_reason_keeps_the_old_value_with_its_reason(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    for ms in (40.0, 40.1):
        store.record(ROW, measured(ms), "fused kernel", COMMIT)
    entry = json.loads(store.path.read_text())["rows"][ROW.id]
    assert (entry["reason"], len(entry["runs"])) == ("fused kernel", 2)
    (old,) = entry["history"]
    assert [run["median"] for run in old["runs"]] == list(RUNS)
    assert (old["reason"], old["replaced_for"]) == ("first", "fused kernel")


def test_a_baseline_does_not_drift_under_its_reason(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    before = store.path.read_bytes()
    with pytest.raises(BaselineError, match="this run is not of the 5 recorded for 'first'"):
        store.record(ROW, measured(55.0), "first", COMMIT)
    assert store.path.read_bytes() == before
    store.record(ROW, measured(50.05), "first", COMMIT)
    six = store.baseline(ROW)
    assert six is not None
    assert len(six.runs) == 6


def test_numbers_never_cross_fingerprints(tmp_path: Path) -> None:
    recorded(tmp_path)
    other = Recorded(tmp_path, THERE)
    assert other.baseline(ROW) is None
    (elsewhere,) = other.elsewhere(ROW)
    assert elsewhere.endswith("and differs in cann: 8.5.0 → 8.6.0")
    assert Recorded(tmp_path, HERE).elsewhere(ROW) == []


def test_a_copied_file_is_caught_however_it_was_dressed_up(tmp_path: Path) -> None:
    store, other = recorded(tmp_path), Recorded(tmp_path, THERE)
    other.path.parent.mkdir()
    content = json.loads(store.path.read_text())
    other.path.write_text(json.dumps(content))
    with pytest.raises(BaselineError, match=f"holds the fingerprint {HERE.name}: copied from another machine"):
        other.baseline(ROW)
    content["fingerprint"] = dict(THERE.identity)
    other.path.write_text(json.dumps(content))
    with pytest.raises(BaselineError, match=f"runs of fingerprint {HERE.digest} in the file of {THERE.digest}"):
        other.baseline(ROW)
    for run in content["rows"][ROW.id]["runs"]:
        run["fingerprint"] = THERE.digest
    other.path.write_text(json.dumps(content))
    with pytest.raises(BaselineError, match="changed by hand or by a merge"):
        other.baseline(ROW)


def test_a_damaged_or_edited_file_is_refused(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    text = store.path.read_text()
    store.path.write_text(text.replace("50.2", "0", 1))
    with pytest.raises(BaselineError, match="changed by hand"):
        store.baseline(ROW)
    store.path.write_text(text[:100])
    with pytest.raises(BaselineError, match="is damaged"):
        store.baseline(ROW)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recorded(tmp_path)
    before = store.path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        store.record(ROW, measured(50.0), "first", COMMIT)
    assert store.path.read_bytes() == before
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["latency.json", "latency.lock"]


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"self_test": True}, "first", "a self-test's latencies"),
        ({"warnings": ("busy host",)}, "first", "is not recorded: busy host"),
        ({"asked_steps": 2000}, "first", "is not recorded: 1023 decode steps of 2000"),
        ({}, "  ", "needs a reason"),
    ],
)
def test_what_is_not_recorded(changes: dict[str, Any], reason: str, message: str, tmp_path: Path) -> None:
    store = Recorded(tmp_path, HERE)
    with pytest.raises(BaselineError, match=message):
        store.record(ROW, replace(measured(50.0), **changes), reason, COMMIT)
    assert not store.path.exists()
