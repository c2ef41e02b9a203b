"""Accuracy per step: the error as a multiple of the stock model's own, and the tokens that differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen2_npu.conformance.report.charts.canvas import color
from qwen2_npu.conformance.report.charts.rows import canvas, heading, number

LIMIT = 1.5
"""``conformance.accuracy.noise.RMS_FACTOR``, which this file, free of torch, cannot import; a test compares them."""


@dataclass(frozen=True)
class AccuracyBar:
    """What `verify` found for one step. ``unexcused``: tokens that differ beyond the noise."""

    rms_ratio: float
    excused: int
    unexcused: int
    positions: int


def errors(steps: Sequence[str], found: Mapping[str, AccuracyBar], width: int) -> str:
    """SVG: RMS error over the stock model's, and the limit."""
    made, axes = canvas(len(steps), width)
    heading(axes, "RMS error ÷ stock model's own (limit 1.5)")
    for row, step in enumerate(steps):
        if step not in found:
            continue
        ratio = found[step].rms_ratio
        bad = not ratio <= LIMIT
        shown = min(ratio, 2.2) if math.isfinite(ratio) else 2.2
        axes.barh(row, shown, height=0.4, color=color("bad" if bad else "measured"))
        number(axes, shown, row, f"{ratio:.2f}")
    axes.axvline(LIMIT, color=color("bad"), linewidth=1.4, linestyle="--")
    axes.set_xlim(0, 2.5)
    return made.svg("RMS error of every step as a multiple of the stock model's rounding noise")


def mismatches(steps: Sequence[str], found: Mapping[str, AccuracyBar], width: int) -> str:
    """SVG: positions with another token, excused and not."""
    made, axes = canvas(len(steps), width)
    heading(axes, "positions with another token: excused near-ties, and beyond noise")
    for row, step in enumerate(steps):
        if step not in found:
            continue
        entry = found[step]
        axes.barh(row, entry.excused, height=0.4, color=color("warn"))
        axes.barh(row, entry.unexcused, left=entry.excused, height=0.4, color=color("bad"))
        total = entry.excused + entry.unexcused
        text = f"{entry.excused} of {entry.positions}" + (f", {entry.unexcused} beyond" if entry.unexcused else "")
        number(axes, total, row, text, "bad" if entry.unexcused else "text")
    most = max((entry.excused + entry.unexcused for entry in found.values()), default=0)
    axes.set_xlim(0, max(most * 1.5, 4))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return made.svg("Positions where the optimised model prefers another token, per step")
