"""Batch sweeps: milliseconds of prefill and decode, by batch."""

from __future__ import annotations

from collections.abc import Mapping

from qwen2_npu.conformance.report.charts.canvas import Canvas, color
from qwen2_npu.conformance.report.charts.ladder import LadderMark

WIDTH, HEIGHT = 280, 220

SERIES = (("documented", "s"), ("measured", "o"))
"""Field of a point, which is its colour's name, and its marker."""


def sweep(points: Mapping[int, LadderMark], title: str) -> str:
    """SVG of one model and phase. ``points``: batch -> its milliseconds."""
    made = Canvas(WIDTH, HEIGHT)
    axes = made.axes(44, 24, WIDTH - 54, HEIGHT - 62)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=color("text"), pad=7)
    batches = sorted(points)
    axes.set_xscale("log", base=2)
    axes.grid(color=color("grid"), linewidth=0.8)
    for name, marker in SERIES:
        known = {batch: ms for batch in batches if (ms := getattr(points[batch], name)) is not None}
        axes.plot(known.keys(), known.values(), marker=marker, markersize=5, linewidth=1.6, color=color(name))
    for batch in batches:
        if ends := points[batch].predicted:
            axes.plot((batch, batch), ends, marker="_", markersize=9, linewidth=1.6, color=color("predicted"))
        if points[batch].bad:
            axes.plot(batch, points[batch].measured, marker="o", markersize=8, color=color("bad"), zorder=5)
    axes.set_ylim(0, max((point.largest for point in points.values()), default=1.0) * 1.08)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel("batch", fontsize=11, color=color("muted"))
    return made.svg(f"{title}, by batch")
