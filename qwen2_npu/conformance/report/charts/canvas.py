"""matplotlib figures of a given size in pixels, turned into inline SVG."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DPI = 72
"""matplotlib's SVG has 72 units per inch: one unit is one pixel."""

COLORS = ("text", "muted", "grid", "documented", "documented-2", "measured", "predicted", "bad", "warn",
          "kind-1", "kind-2", "kind-3", "kind-4", "kind-5", "kind-6", "kind-7", "kind-8", "kind-9")  # fmt: skip
"""Names of the page's CSS variables."""

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"

HOW_TO_INSTALL = "the report needs matplotlib, jinja2 and scipy: pip install 'qwen2-npu[report]'"


def color(name: str) -> str:
    """A stand-in that :meth:`Canvas.svg` replaces by ``var(--name)``. matplotlib has no variables."""
    return f"#fe01{COLORS.index(name):02x}"


@dataclass
class Canvas:
    """One figure. Sizes and positions are in pixels, from the top left."""

    width: int
    height: int
    figure: Any = field(init=False)

    def __post_init__(self) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError(HOW_TO_INSTALL) from error
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI)
        self.figure.patch.set_alpha(0)

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes whose frame covers this rectangle."""
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.patch.set_alpha(0)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(color("grid"))
        axes.tick_params(colors=color("muted"), labelsize=11, length=3, color=color("grid"))
        axes.set_axisbelow(True)
        return axes

    def svg(self, title: str) -> str:
        """The figure as an element of the page. ``title``: what a screen reader says."""
        buffer = io.StringIO()
        with _settings():
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _inline(buffer.getvalue(), title)


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    # Text stays text, and the same figure gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qwen2-npu"}):
        yield


def _inline(text: str, title: str) -> str:
    for prefix, uri in (("", _SVG), ("xlink", _XLINK)):
        ElementTree.register_namespace(prefix, uri)
    root = ElementTree.fromstring(text)
    for unwanted in [child for child in root if child.tag == f"{{{_SVG}}}metadata"]:
        root.remove(unwanted)
    width, height = (root.get(side, "").removesuffix("pt") for side in ("width", "height"))
    root.set("width", width)
    root.set("height", height)
    root.set("role", "img")
    root.set("aria-label", title)
    used = set(re.findall(r"#([\w-]+)", text))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        style = element.get("style", "")
        if "font" in style:
            # The page's own font, at the size that was asked for.
            element.set("style", re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", style))
    plain = ElementTree.tostring(root, encoding="unicode")
    return re.sub(r"#fe01([0-9a-f]{2})", lambda found: f"var(--{COLORS[int(found[1], 16)]})", plain)
