"""The session's summary in words."""

from __future__ import annotations

from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf.documented import read
from qwen2_npu.conformance.perf.gate import Against, judge
from qwen2_npu.conformance.perf.ledger import Ledger
from qwen2_npu.conformance.sizes import SIZES
from tests.perf.fake_runner import measurement_of

NUMBERS = read()[:4]
ROWS = [number.row for number in NUMBERS]


def ledger() -> Ledger:
    found = Ledger()
    for number, factor in zip(NUMBERS[:2], (1.0, 1.5), strict=True):
        measurement = measurement_of({"prefill": number.ms * factor, "decode": number.ms * factor})
        against = Against(documented=number, transformers="4.37.0", card=HARDWARE[DOCUMENTED_SOC])
        found.verdicts[number.row.id] = judge(number.row, SIZES["7B"], measurement, against, strict=True)
    found.not_run[ROWS[2].id] = "needs 8 cards of this kind"
    return found


def test_rows_nobody_judged() -> None:
    missing, not_run = ledger().unjudged(ROWS)
    assert missing.startswith("1 rows have a baseline and no test ran for them")
    assert ROWS[3].node_id in missing
    assert not_run == "1 rows not run: needs 8 cards of this kind"
    assert ledger().unjudged(ROWS[:2]) == []


def test_lines_say_what_was_compared_with_what_and_what_was_not_run() -> None:
    found = ledger()
    found.recorded[ROWS[0].id] = 3
    lines = list(found.lines(machine="Ascend910B4-0123", scope="7b-*", outside=40, strict=False))
    assert lines[0] == "SELF-TEST: latencies were injected, nothing was measured, nothing is recorded"
    text = "\n".join(lines)
    assert "machine: Ascend910B4-0123" in text
    assert "documented on Atlas 800I A2, SKU unknown (mean at most × 1.10 and the rounding): 2 rows, 1 passed" in text
    assert f"FAILED {ROWS[1].id}: slower: mean 78 ms" in text
    assert "not run: 1 rows: needs 8 cards of this kind" in text
    assert "outside of --gate-rows=7b-*: 40 rows, neither run nor gated" in text
    assert "recorded: 1 rows, whose baselines now have 3 runs" in text
    assert lines[-1] == "without --gate a row that is not compared passes"
