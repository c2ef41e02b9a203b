"""Bar charts whose rows stand beside the page's own labels: both are ``ROW`` pixels high."""

from __future__ import annotations

from typing import Any

from qwen2_npu.conformance.report.charts.canvas import Canvas, color

ROW = 44
"""Also in the page's style sheet: ``.rows > div``."""

TOP, BOTTOM, LEFT, RIGHT = 22, 24, 12, 44
"""Room for the heading, the scale, the axis, and a number behind the longest bar."""


def canvas(rows: int, width: int) -> tuple[Canvas, Any]:
    """A figure and its axes; row ``i`` is centred at y = i, the first one on top."""
    made = Canvas(width, TOP + rows * ROW + BOTTOM)
    axes = made.axes(LEFT, TOP, width - LEFT - RIGHT, rows * ROW)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=color("grid"), linewidth=0.8)
    for edge in range(rows + 1):
        axes.axhline(edge - 0.5, color=color("grid"), linewidth=0.5)
    return made, axes


def heading(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold", color=color("text"), pad=7)


def number(axes: Any, x: float, y: float, text: str, name: str = "text") -> None:
    """Behind a bar that ends at ``x``."""
    axes.annotate(
        text, (x, y), xytext=(9, 0), textcoords="offset points", va="center", fontsize=10.5, color=color(name)
    )
