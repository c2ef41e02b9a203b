"""The ladder: documented bars, and what was measured and predicted as marks on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2_npu.conformance.report.charts.canvas import color
from qwen2_npu.conformance.report.charts.rows import canvas, heading, number

MODES = (("eager", "documented-2", -0.2), ("graph", "documented", 0.2))
"""Mode, its colour, and where its bar stands in the row."""

BAR = 0.3


@dataclass(frozen=True)
class LadderMark:
    """Milliseconds of one row, predicted from the least to the most; None where none are. ``bad``: it fails."""

    documented: float | None = None
    measured: float | None = None
    predicted: tuple[float, float] | None = None
    bad: bool = False

    @property
    def largest(self) -> float:
        return max((value for value in (self.documented, self.measured, *(self.predicted or ())) if value), default=0.0)


def ladder(steps: Sequence[str], points: Mapping[tuple[str, str], LadderMark], title: str, width: int) -> str:
    """SVG of one model and phase.

    Args:
        points: (step, mode) -> its milliseconds.
    """
    made, axes = canvas(len(steps), width)
    heading(axes, title)
    for row, step in enumerate(steps):
        for mode, name, offset in MODES:
            point = points.get((step, mode), LadderMark())
            y = row + offset
            if point.documented is not None:
                axes.barh(y, point.documented, height=BAR, color=color(name))
            marks(axes, point, y)
            _label(axes, point, y)
    largest = max((point.largest for point in points.values()), default=0.0) or 1.0
    axes.set_xlim(0, largest * 1.16)
    return made.svg(f"{title}: documented, measured and predicted milliseconds per step of the ladder")


def marks(axes: Any, point: LadderMark, y: float) -> None:
    """A line from end to end of what the model predicts, a dot where the machine measured; red where that fails."""
    if point.predicted is not None:
        axes.plot(
            point.predicted, (y, y), marker="|", markersize=11, markeredgewidth=1.6, linewidth=1.6,
            color=color("predicted"), clip_on=False, zorder=3,
        )  # fmt: skip
    if point.measured is not None:
        name = "bad" if point.bad else "measured"
        axes.plot(point.measured, y, marker="o", markersize=8, color=color(name), clip_on=False)


def _label(axes: Any, point: LadderMark, y: float) -> None:
    if point.measured is not None:
        beside = "" if point.documented is None else f" / {point.documented:.0f}"
        number(axes, point.largest, y, f"{point.measured:.0f}{beside}", "bad" if point.bad else "text")
    elif point.documented is not None:
        number(axes, point.largest, y, f"{point.documented:.0f}", "muted")
