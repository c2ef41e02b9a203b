"""Questions that only a device can answer, asked of the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2_npu.conformance.machine.verified import Where


@dataclass(frozen=True)
class Answer:
    """What the device did.

    Attributes:
        text: in words.
        as_assumed: whether that is what this project takes for true; None where it takes nothing for true.
        facts: the numbers behind the words.
    """

    text: str
    as_assumed: bool | None = None
    facts: dict[str, Any] | None = None


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        how: what is done to find out.
        assumed: what this project takes for true until a device says otherwise; empty where it takes nothing.
        ask: the device's name -> what it did.
        real_npu_only: on anything else the answer would be about the host.
    """

    name: str
    question: str
    how: str
    assumed: str
    ask: Callable[[str], Answer]
    real_npu_only: bool = False


OF_THE_EMULATOR = "the emulated device's own behaviour, which is what this project assumes: no answer about an NPU"
OF_THE_KERNELS = "the portable kernels' own behaviour: no answer about an NPU"
NOT_ASKED = "not asked: it needs a real NPU"


def run(probes: Sequence[Probe], device: str, where: Where) -> list[dict[str, Any]]:
    """Every probe's answer as plain values; a probe that breaks answers with its error.

    Args:
        where: what ``device`` is.
    """
    return [_asked(probe, device, where) for probe in probes]


def _asked(probe: Probe, device: str, where: Where) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": probe.name,
        "question": probe.question,
        "how": probe.how,
        "assumed": probe.assumed,
        "answered_by": str(where),
    }
    if where is not Where.NPU:
        entry["note"] = OF_THE_EMULATOR if where is Where.EMULATED else OF_THE_KERNELS
    if probe.real_npu_only and where is not Where.NPU:
        return entry | {"answer": NOT_ASKED, "as_assumed": None}
    try:
        answer = probe.ask(device)
    except Exception as error:  # an operator that refuses is an answer, too
        text = f"error: {type(error).__name__}: {str(error).strip()[:2000]}"
        return entry | {"answer": text, "as_assumed": False if probe.assumed else None}
    return entry | {"answer": answer.text, "as_assumed": answer.as_assumed, "facts": answer.facts or {}}
