"""Answers are labelled with who gave them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qwen2_npu.conformance.machine.bug_report import probes
from qwen2_npu.conformance.machine.bug_report.probes import Answer, Probe
from qwen2_npu.conformance.machine.verified import Where


def probe(ask: Callable[[str], Answer] = lambda device: Answer("yes", True), **changes: object) -> Probe:
    values = {"name": "n", "question": "q?", "how": "h", "assumed": "yes", "ask": ask, **changes}
    return Probe(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "by", "note"),
    [
        (Where.NPU, "real NPU", None),
        (Where.EMULATED, "emulated", probes.OF_THE_EMULATOR),
        (Where.CPU, "cpu", probes.OF_THE_KERNELS),
    ],
)
def test_who_answers(where: Where, by: str, note: str | None) -> None:
    (entry,) = probes.run([probe()], "npu", where)
    assert (entry["answered_by"], entry.get("note"), entry["answer"]) == (by, note, "yes")


def test_what_needs_hardware_is_not_asked_of_the_emulator() -> None:
    def never(device: str) -> Answer:
        raise AssertionError("asked")

    (entry,) = probes.run([probe(never, real_npu_only=True)], "npu", Where.EMULATED)
    assert (entry["answer"], entry["as_assumed"]) == (probes.NOT_ASKED, None)
    (entry,) = probes.run([probe(never, real_npu_only=True)], "npu", Where.NPU)
    assert entry["answer"] == "error: AssertionError: asked"


@pytest.mark.parametrize(("assumed", "as_assumed"), [("yes", False), ("", None)])
def test_an_error_is_an_answer(assumed: str, as_assumed: bool | None) -> None:
    def broken(device: str) -> Answer:
        raise RuntimeError("not supported")

    (entry,) = probes.run([probe(broken, assumed=assumed)], "npu", Where.NPU)
    assert (entry["answer"], entry["as_assumed"]) == ("error: RuntimeError: not supported", as_assumed)
