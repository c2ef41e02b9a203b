"""What a card can do at most, as data with its source. Used for physical floors and for predictions.

A figure here bounds a measurement from below (bytes / bandwidth, operations / peak), so an error on the low side would
call a right measurement wrong: every figure says where it comes from and how sure it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Certainty = Literal["datasheet", "reported", "inferred"]
"""The maker's own figure; somebody else's; or what fits the documented latencies."""


@dataclass(frozen=True)
class Figure:
    """One number with its unit and provenance."""

    value: float
    unit: str
    source: str
    certainty: Certainty


@dataclass(frozen=True)
class Hardware:
    """One card.

    Attributes:
        soc: as ``torch.npu.get_device_name`` gives it.
        memory_bandwidth: of device memory, bytes per second.
        bf16_peak: dense bf16 operations (a multiply and an add are two) per second.
        server: the product the card is known to sit in.
    """

    soc: str
    memory_bandwidth: Figure
    bf16_peak: Figure
    server: str


_FITS = (
    "fits the upstream guide's tables: 7B decode at batch 1 moves 14.14 GB of weights in 23 ms (77 % of it); "
    "72B on 8 cards 59 %"
)
_ASCEND_910B4_BANDWIDTH = Figure(0.8e12, "B/s", _FITS, "inferred")
_ASCEND_910B4_PEAK = Figure(
    280e12,
    "FLOP/s",
    "fp16 peak as cloud providers list it (ai.gitee.com/docs/compute/clusters_gpu/ascend_gpu); bf16 runs at the fp16 "
    "rate; the guide's 7B prefill at batch 4 reaches 56 % of it",
    "reported",
)

HARDWARE: dict[str, Hardware] = {
    card.soc: card
    for card in (
        Hardware("Ascend910B4", _ASCEND_910B4_BANDWIDTH, _ASCEND_910B4_PEAK, server="Atlas 800I A2"),
        # The same card with 64 GB of memory.
        Hardware("Ascend910B4-1", _ASCEND_910B4_BANDWIDTH, _ASCEND_910B4_PEAK, server="Atlas 800I A2"),
    )
}
"""SoC name -> card."""

DOCUMENTED_SOC = "Ascend910B4"
"""The card assumed where the documented tables, which name none, need one."""
