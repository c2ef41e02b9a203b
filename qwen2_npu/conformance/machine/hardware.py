"""What a card can do at most, as data with its source. Used for physical floors and for predictions.

A figure here bounds a measurement from below (bytes / bandwidth, operations / peak), so an error on the low side would
call a right measurement wrong: every figure says where it comes from and how sure it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Certainty = Literal["datasheet", "reported", "inferred", "fitted"]
"""The maker's own figure; somebody else's; what fits the documented latencies; or the cost model's fit to them."""


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
        int8_peak: the same of products of 8-bit integers, summed in 32 bits.
        server: the product the card is known to sit in.
        link_bandwidth: of all its links to the server's other cards together, bytes per second, as published.
        launch_overhead: seconds between two kernels of a graph.
        host_overhead: seconds of the host's work per operator in single-op mode.
        collective_overhead: seconds to start an all-reduce.

    The last four are None where nothing is known; floors need none of them.
    """

    soc: str
    memory_bandwidth: Figure
    bf16_peak: Figure
    int8_peak: Figure
    server: str
    link_bandwidth: Figure | None = None
    launch_overhead: Figure | None = None
    host_overhead: Figure | None = None
    collective_overhead: Figure | None = None


_FITS = (
    "fits the upstream guide's tables: 7B decode at batch 1 moves 14.14 GB of weights in 23 ms (77 % of it); "
    "72B on 8 cards 59 %"
)
_ASCEND_910B4_BANDWIDTH = Figure(0.8e12, "B/s", _FITS, "inferred")
_ASCEND_910B4_1_BANDWIDTH = Figure(
    1.6e12,
    "B/s",
    "as others list the 64 GB versions of the 800I A2 and 300I A2 (those with 32 GB: 0.8 TB/s); the maker's page was "
    "not read. Were it less, the floor would only be lower than it could be",
    "reported",
)
_ASCEND_910B4_PEAK = Figure(
    280e12,
    "FLOP/s",
    "fp16 peak as cloud providers list it (ai.gitee.com/docs/compute/clusters_gpu/ascend_gpu); bf16 runs at the fp16 "
    "rate; the guide's 7B prefill at batch 4 reaches 56 % of it",
    "reported",
)
_ASCEND_910B4_INT8_PEAK = Figure(
    560e12,
    "FLOP/s",
    "as cloud providers list it beside the fp16 peak (ai.gitee.com/docs/compute/clusters_gpu/ascend_gpu); twice that "
    "peak, as the maker describes the matrix unit: in the time of a product of 16 × 16 and 16 × 16 fp16 numbers it "
    "makes one of 16 × 32 and 32 × 16 of int8 (CANN's guide to operators, hiascend.com, atlasopdev_10_0008)",
    "reported",
)
_ASCEND_910B_LINKS = Figure(
    392e9,
    "B/s",
    "seven HCCS links per card, one to each of the others: Huawei's Atlas 800T A2 user guide (support.huawei.com, "
    "EDOC1100317202) as others quote it, the page itself was not read; arthurchiao.art/blog/gpu-data-sheets says 56 "
    "GB/s per pair of cards, both ways together. The 800I A2 is also sold without HCCS; the guide does not say which "
    "it had, but its 72B rows need more (89 GB/s in the fit) than PCIe 5.0 x16 carries one way (64)",
    "reported",
)

_FIT = "baselines/cost_model.json, fitted by scripts/fit_cost_model.py on "
_LAUNCH = Figure(0.0, "s", f"{_FIT}the guide's 7B tables: they leave no time for a launch of its own", "fitted")
_HOST = Figure(29.42e-6, "s", f"{_FIT}the guide's 7B tables", "fitted")
_COLLECTIVE = Figure(36.0e-6, "s", f"{_FIT}one configuration of the guide's 72B tables", "fitted")

HARDWARE: dict[str, Hardware] = {
    card.soc: card
    for card in (
        Hardware(
            "Ascend910B4",
            _ASCEND_910B4_BANDWIDTH,
            _ASCEND_910B4_PEAK,
            _ASCEND_910B4_INT8_PEAK,
            server="Atlas 800I A2",
            link_bandwidth=_ASCEND_910B_LINKS,
            launch_overhead=_LAUNCH,
            host_overhead=_HOST,
            collective_overhead=_COLLECTIVE,
        ),
        # The same cores with 64 GB of memory. The overheads are fitted for the card that the documented tables assume.
        Hardware(
            "Ascend910B4-1",
            _ASCEND_910B4_1_BANDWIDTH,
            _ASCEND_910B4_PEAK,
            _ASCEND_910B4_INT8_PEAK,
            server="Atlas 800I A2",
            link_bandwidth=_ASCEND_910B_LINKS,
        ),
    )
}
"""SoC name -> card."""

DOCUMENTED_SOC = "Ascend910B4"
"""The card assumed where the documented tables, which name none, need one."""
