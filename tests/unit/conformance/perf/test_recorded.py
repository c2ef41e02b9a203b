"""The store of recorded baselines: whole files, history, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.perf.documented import BaselineError, read
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.prediction_interval import prediction_interval
from qwen2_npu.conformance.perf.recorded import Recorded, _digest, protocol
from tests.perf.fake_runner import measurement_of

PREFILL, ROW = (number.row for number in read()[:2])
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


# ---- each rule alone ------------------------------------------------------------------------------------------------
def test_each_phase_has_its_own_baseline(tmp_path: Path) -> None:
    assert (PREFILL.phase, ROW.phase) == ("prefill", "decode")
    assert PREFILL.configuration == ROW.configuration
    store = recorded(tmp_path)
    assert store.baseline(PREFILL) is None
    store.record(PREFILL, measured(50.0), "first", COMMIT)
    prefill, decode = store.baseline(PREFILL), store.baseline(ROW)
    assert prefill is not None
    assert decode is not None
    assert [run.median for run in prefill.runs] == [100.0]
    assert [run.median for run in decode.runs] == list(RUNS)
    assert (prefill.row_id, decode.row_id) == (PREFILL.id, ROW.id)
    assert json.loads(store.path.read_text())["rows"][PREFILL.id]["runs"][0]["samples"] == 1


def with_mean(median: float, mean: float) -> Measurement:
    """Of 1023 decode steps 512 took ``median``, and the others what is missing in the mean."""
    other = (1023 * mean - 512 * median) / 511
    return replace(measured(median), decode_ms=(median,) * 512 + (other,) * 511)


@pytest.mark.parametrize("statistic", ["median", "mean"])
@pytest.mark.parametrize("side", ["low", "high"])
def test_a_run_is_of_its_kind_up_to_the_margin_of_each_figure(statistic: str, side: str, tmp_path: Path) -> None:
    interval = prediction_interval(RUNS)  # median and mean of a run are the same
    limit = getattr(interval, side)
    away = {"low": 1 - 1e-7, "high": 1 + 1e-7}[side]
    for ms, accepted in ((limit / away, True), (limit * away, False)):
        store = recorded(tmp_path / str(accepted))
        run = with_mean(ms, interval.centre) if statistic == "median" else with_mean(interval.centre, ms)
        if accepted:
            baseline = store.record(ROW, run, "first", COMMIT)
            assert len(baseline.runs) == 6
            continue
        with pytest.raises(BaselineError, match="this run is not of the 5 recorded for 'first'") as refused:
            store.record(ROW, run, "first", COMMIT)
        assert f"({statistic} {ms:.4g} ms, {interval.low:.4g} to {interval.high:.4g} expected)" in str(refused.value)
        kept = store.baseline(ROW)
        assert kept is not None
        assert len(kept.runs) == 5


def test_the_margin_itself_is_within(tmp_path: Path) -> None:
    interval = prediction_interval(RUNS)
    for ms in (interval.low, interval.high):
        assert len(recorded(tmp_path / str(ms)).record(ROW, measured(ms), "first", COMMIT).runs) == 6


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_run_a_fifth_away_in_either_direction_is_never_added(factor: float, tmp_path: Path) -> None:
    store = recorded(tmp_path)
    with pytest.raises(BaselineError, match="find out why, or give a new reason"):
        store.record(ROW, measured(50.0 * factor), "first", COMMIT)


def test_the_first_five_runs_are_not_held_against_one_another(tmp_path: Path) -> None:
    store = recorded(tmp_path, runs=(50.0, 60.0, 40.0, 55.0))
    assert len(store.record(ROW, measured(45.0), "first", COMMIT).runs) == 5


OTHER_PROTOCOL = {
    "input_tokens": {"input_tokens": 512, "contexts": (0, *range(512, 512 + 1023))},
    "decode_steps": {"asked_steps": 64, "decode_ms": (50.0,) * 64, "contexts": (0, *range(1024, 1024 + 64))},
    "weights": {"weights": "Qwen2-7B-Instruct"},
}


@pytest.mark.parametrize("key", OTHER_PROTOCOL)
def test_another_protocol_starts_a_new_baseline_under_the_same_reason(key: str, tmp_path: Path) -> None:
    store, other = recorded(tmp_path), replace(measured(50.0), **OTHER_PROTOCOL[key])
    assert {name for name, value in protocol(other).items() if value != protocol(measured(50.0))[name]} == {key}
    baseline = store.record(ROW, other, "first", COMMIT)
    assert len(baseline.runs) == 1
    assert baseline.protocol[key] == protocol(other)[key]
    (old,) = json.loads(store.path.read_text())["rows"][ROW.id]["history"]
    assert (len(old["runs"]), old["replaced_for"], old["protocol"][key]) == (5, "first", protocol(measured(50.0))[key])
    assert "history" not in old
    assert old["replaced"] == json.loads(store.path.read_text())["rows"][ROW.id]["runs"][0]["date"]


def test_all_of_the_history_is_kept(tmp_path: Path) -> None:
    store = recorded(tmp_path, runs=RUNS[:1])
    for reason in ("second", "third", "first"):
        store.record(ROW, measured(50.0), reason, COMMIT)
    history = json.loads(store.path.read_text())["rows"][ROW.id]["history"]
    assert [(old["reason"], old["replaced_for"]) for old in history] == [
        ("first", "second"), ("second", "third"), ("third", "first"),
    ]  # fmt: skip


def leaves(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, (*place, key))
    else:
        yield place, content


def edited(value: Any) -> Any:
    """By as little as a hand can do."""
    if isinstance(value, bool):
        return not value
    return (
        math.nextafter(value, 1e9) if isinstance(value, float) else value + 1 if isinstance(value, int) else value + " "
    )


def test_no_value_of_the_file_can_be_edited(tmp_path: Path) -> None:
    """Every single one: figures, reasons, the protocol, the history, provenance, the digest itself."""
    store = recorded(tmp_path, runs=RUNS[:2])
    store.record(ROW, measured(50.0), "second", COMMIT)
    text = store.path.read_text()
    places = list(leaves(json.loads(text)))
    assert len(places) > 30
    for place, value in places:
        content = json.loads(text)
        inside = content
        for key in place[:-1]:
            inside = inside[key]
        for change in (edited, None):
            if change is None:
                inside.pop(place[-1])
            else:
                inside[place[-1]] = change(value)
            store.path.write_text(json.dumps(content))
            with pytest.raises(BaselineError):
                store.baseline(ROW)
    store.path.write_text(text)
    assert store.baseline(ROW) is not None


@pytest.mark.parametrize("text", ["[]", "{}", "7", '{"fingerprint": [], "rows": {}}', '{"fingerprint": 7, "rows": 7}'])
def test_a_file_of_another_form_is_damaged(text: str, tmp_path: Path) -> None:
    store = recorded(tmp_path, runs=RUNS[:1])
    store.path.write_text(text)
    with pytest.raises(BaselineError, match="is damaged"):
        store.baseline(ROW)
    store.path.unlink()
    store.path.mkdir()
    with pytest.raises(BaselineError, match="is damaged"):
        store.baseline(ROW)


def test_rows_in_another_order_and_words_in_any_script_are_the_same_content(tmp_path: Path) -> None:
    """A merge may sort keys; the digest is of the content."""
    store = recorded(tmp_path, runs=RUNS[:1])
    store.record(PREFILL, measured(50.0), "更快", COMMIT)
    content = json.loads(store.path.read_text(encoding="utf-8"))
    content["rows"] = dict(reversed(content["rows"].items()))
    store.path.write_text(json.dumps(content))
    assert store.baseline(PREFILL) is not None


def test_a_file_of_another_machine_is_refused_by_each_of_its_marks(tmp_path: Path) -> None:
    """With a digest that fits: one run of several is from elsewhere, or the fingerprint is not the folder's."""
    store = recorded(tmp_path)
    content = json.loads(store.path.read_text())
    content["rows"] = {PREFILL.id: json.loads(store.path.read_text())["rows"][ROW.id], **content["rows"]}
    content["rows"][ROW.id]["runs"][3]["fingerprint"] = THERE.digest
    body = {key: content[key] for key in ("fingerprint", "rows")}
    store.path.write_text(json.dumps({**body, "digest": _digest(body)}))
    with pytest.raises(BaselineError, match=f"runs of fingerprint {THERE.digest} in the file of {HERE.digest}"):
        store.baseline(ROW)
    other = recorded(tmp_path / "other", THERE)
    store.path.write_bytes(other.path.read_bytes())
    with pytest.raises(BaselineError, match=f"holds the fingerprint {THERE.name}: copied from another machine"):
        store.baseline(ROW)


def test_other_machines_are_listed_with_their_medians_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    recorded(tmp_path, THERE, RUNS[:2])
    damaged = tmp_path / "recorded" / "0-damaged" / "latency.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    store = Recorded(tmp_path, HERE)
    unreadable, there = store.elsewhere(ROW)
    assert "is damaged" in unreadable
    assert there == f"{THERE.name} has 50, 50.2 ms and differs in cann: 8.6.0 → 8.5.0"
    assert [text for text in store.elsewhere(PREFILL) if THERE.name in text] == []


def test_the_digest_is_of_the_content_with_its_keys_sorted() -> None:
    """Files of earlier versions are read: the digest of a content stays what it was."""
    text = '{"a": 1.5, "b": {"c": "更快"}}'
    assert _digest({"b": {"c": "更快"}, "a": 1.5}) == hashlib.sha256(text.encode()).hexdigest()
