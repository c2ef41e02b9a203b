"""One claim over the runs, as a line small enough for a table's cell."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_npu.conformance.report.charts.canvas import Canvas, color

WIDTH, HEIGHT = 150, 34
RUNS = 30
"""The newest that are drawn."""


def trend(values: Sequence[tuple[float, bool]], title: str) -> str:
    """SVG. ``values``: oldest first, with whether the run was as it should be; the last one is this run's."""
    shown = list(values)[-RUNS:]
    made = Canvas(WIDTH, HEIGHT)
    axes = made.axes(4, 4, WIDTH - 8, HEIGHT - 8)
    axes.axis("off")
    numbers = [number for number, _ in shown]
    axes.plot(range(len(shown)), numbers, color=color("muted"), linewidth=1.2)
    for x, (number, good) in enumerate(shown):
        last = x == len(shown) - 1
        if last or not good:
            axes.plot(x, number, marker="o", markersize=5 if last else 3.5, color=color("measured" if good else "bad"))
    low, high = min(numbers), max(numbers)
    margin = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    axes.set_ylim(low - margin, high + margin)
    return made.svg(title)
