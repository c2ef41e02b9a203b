"""What a session hands to the judge of a row. What pytest makes of the verdict is in tests/perf/test_fail_closed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.machine.hardware import HARDWARE
from qwen2_npu.conformance.perf import session
from qwen2_npu.conformance.perf.gate import Against
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.memory import memory_of
from qwen2_npu.conformance.perf.recorded import Recorded
from qwen2_npu.conformance.perf.rows import Row, user_rows
from qwen2_npu.conformance.perf.session import EVERY_ROW, GateOptions, LatencyGate
from qwen2_npu.conformance.sizes import SIZES
from tests.perf.fake_runner import FakeRunner, measurement_of
from tests.perf.test_fail_closed import copied_baselines

# Neither the documented lengths, nor as many steps as were asked for: each number is known by its value.
SHORT = {"input_tokens": 1000, "asked_steps": 9, "decode_ms": [50.0] * 7, "contexts": [0, *range(1000, 1007)]}
USER = user_rows("0.5B", (3,), ("eager",), ("swiglu",))[0]


def gate_of(folder: Path, reason: str | None = None, scope: str = EVERY_ROW, **settings: Any) -> LatencyGate:
    runner = FakeRunner({"recordable": True, "changes": SHORT} | settings)
    return LatencyGate(GateOptions(True, scope, reason, False), runner, [USER], folder)


def handed(gate: LatencyGate, row: Row, monkeypatch: pytest.MonkeyPatch) -> Against:
    """What the row is compared with; its own size and measurement go beside it."""
    found: list[Against] = []
    right = session.judge

    def judge(judged: Row, size: Any, measurement: Measurement, against: Against, **how: Any) -> Any:
        assert (judged, size) == (row, SIZES[row.configuration.model])
        assert measurement == gate.runner.measured(row.configuration)
        found.append(against)
        return right(judged, size, measurement, against, **how)

    monkeypatch.setattr(session, "judge", judge)
    gate._judge(row)
    return found[0]


@pytest.mark.parametrize("version", ["4.37.0", "5.24.0"])
@pytest.mark.parametrize(
    "name", ["7b-ladder-b4-eager-original-prefill", "72b-ladder-b4-graph-fused_qkv-decode", USER.id]
)
def test_a_row_is_compared_with_what_is_its_own(
    name: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gate_of(copied_baselines(tmp_path), identity={"transformers": version})
    row = gate.rows[name]
    what = row.configuration
    assert handed(gate, row, monkeypatch) == Against(
        documented=gate.documented.get(name),
        transformers=version,
        card=HARDWARE["Ascend910B4"],
        memory=memory_of(
            SIZES[what.model], what.step, what.batch, 1000, 9, cards=what.cards, float32_logits=version == "4.37.0"
        ),
        elsewhere=[],
    )


def test_the_rows_of_every_pattern_count(tmp_path: Path) -> None:
    gate = gate_of(copied_baselines(tmp_path), scope=f"7b-batch-b1-*, {USER.id}")
    assert [*gate.rows] == [*(f"7b-batch-b1-graph-fused_qkv-{phase}" for phase in ("prefill", "decode")), USER.id]
    assert len(gate.rows) + gate.outside == len(gate.documented) + 1


def test_memory_is_judged_on_npus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_of(copied_baselines(tmp_path), identity={"device": "cuda", "verified": "cuda (portable kernels)"})
    assert handed(gate, USER, monkeypatch).memory is None


@pytest.mark.parametrize("name", ["7b-ladder-b4-graph-fused_qkv-decode", USER.id])
def test_recorded_runs_are_compared_unless_more_are_recorded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a documented row, too: what was reached here is less than what the table allows."""
    folder = copied_baselines(tmp_path)
    gate = gate_of(folder)
    row = gate.rows[name]
    store = Recorded(folder, gate.runner.fingerprint)
    baseline = store.record(row, measurement_of({"prefill": 100.0, "decode": 50.0}, self_test=False), "first", {})
    elsewhere = Recorded(folder, FakeRunner({"identity": {"soc": "Ascend910B3"}}).fingerprint)
    elsewhere.record(row, measurement_of({"prefill": 100.0, "decode": 50.0}, self_test=False), "first", {})
    for reason, recorded in ((None, baseline), ("first", None)):
        against = handed(gate_of(folder, reason), row, monkeypatch)
        assert against.recorded == recorded
        assert [text.split()[0] for text in against.elsewhere] == [elsewhere.fingerprint.name]
