"""The roofline: what a graph could reach on the card, and what it reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen2_npu.conformance.machine.hardware import Hardware
from qwen2_npu.conformance.report.charts.canvas import Canvas, color

WIDTH, HEIGHT = 480, 430


@dataclass(frozen=True)
class RooflinePoint:
    """One row: FLOPs and bytes of its lowered graph on one card, and its milliseconds from one source."""

    name: str
    flops: int
    nbytes: int
    ms: float
    source: str
    """``documented`` or ``measured``."""

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.nbytes

    @property
    def teraflops(self) -> float:
        """Reached, 1e12 FLOP/s."""
        return self.flops / self.ms / 1e9

    def share(self, card: Hardware) -> float:
        """Of what the roof allows at this intensity."""
        roof = min(card.bf16_peak.value, card.memory_bandwidth.value * self.intensity)
        return self.teraflops * 1e12 / roof


def roofline(runs: Sequence[RooflinePoint], card: Hardware) -> str:
    """SVG. Points above the roof would be a timing error, or another card."""
    made = Canvas(WIDTH, HEIGHT)
    axes = made.axes(52, 12, WIDTH - 66, HEIGHT - 56)
    peak, bandwidth = card.bf16_peak.value / 1e12, card.memory_bandwidth.value / 1e12
    lowest, highest = 1.0, 4000.0
    ridge = peak / bandwidth
    axes.plot([lowest, ridge, highest], [bandwidth * lowest, peak, peak], color=color("muted"), linewidth=2)
    axes.text(ridge * 1.1, peak * 1.12, f"{peak:.0f} TFLOP/s bf16", fontsize=11, color=color("muted"))
    axes.text(11, bandwidth * 32, f"{bandwidth:.1f} TB/s", fontsize=11, color=color("muted"))
    markers = {"prefill": "^", "decode": "o"}
    for run in runs:
        phase = "prefill" if "prefill" in run.name else "decode"
        documented = run.source == "documented"
        axes.plot(
            run.intensity, run.teraflops, marker=markers[phase], markersize=6 if documented else 7, linestyle="none",
            color=color(run.source), markerfacecolor="none" if documented else color(run.source),
            markeredgewidth=1.3, alpha=0.9,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(lowest, highest)
    axes.set_ylim(bandwidth * lowest, peak * 2)
    axes.grid(color=color("grid"), linewidth=0.8)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("FLOPs per byte", fontsize=11, color=color("muted"))
    axes.set_ylabel("TFLOP/s per card", fontsize=11, color=color("muted"), labelpad=2)
    return made.svg(f"Roofline of the {card.soc}")
