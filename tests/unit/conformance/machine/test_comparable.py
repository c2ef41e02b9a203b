"""Which machine the documented tables speak of."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2_npu.conformance.machine.comparable import card_of, not_comparable
from qwen2_npu.conformance.machine.fingerprint import Fingerprint

ATLAS: dict[str, Any] = {
    "device": "npu",
    "verified": "npu (CANN 8.5.0)",
    "soc": "Ascend910B4",
    "machine": "aarch64",
    "product": None,
}


@pytest.mark.parametrize(
    "change",
    [{}, {"soc": "Ascend910B4-1"}, {"soc": "Ascend910B2"}, {"product": "Atlas 800I A2"}, {"product": "S920X10"}],
)
def test_any_card_of_the_family_in_an_arm_host_counts(change: dict[str, Any]) -> None:
    assert not_comparable(Fingerprint.read(ATLAS | change), "Atlas 800I A2") is None


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu", "verified": "cpu (portable kernels)"},
        {"device": "cuda", "verified": "cuda (portable kernels)"},
        {"verified": "emulated (torch_npu 2.13.0, torchair)"},
        {"machine": "x86_64"},
        {"soc": "Ascend310P3"},
        {"soc": "Ascend910_9391"},
        {"soc": None},
        {"product": "Atlas 800T A2"},
    ],
)
def test_nothing_else_does(change: dict[str, Any]) -> None:
    reason = not_comparable(Fingerprint.read(ATLAS | change), "Atlas 800I A2")
    assert reason is not None
    assert reason.startswith("not comparable: needs an Atlas 800I A2 (this is ")


def test_cards() -> None:
    card, why = card_of(Fingerprint.read(ATLAS))
    assert card is not None
    assert (card.soc, why) == ("Ascend910B4", "")
    assert card_of(Fingerprint.read(ATLAS | {"soc": "Ascend910B2"})) == (
        None,
        "nothing is known of Ascend910B2: add its bandwidth and peak to qwen2_npu/conformance/machine/hardware.py",
    )
    assert card_of(Fingerprint.read({"device": "cpu"})) == (None, "")
    assert card_of(Fingerprint.read({"device": "cuda", "soc": "H100"}))[1].startswith("nothing is known of H100")
