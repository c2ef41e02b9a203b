"""SVG that stands inside a page."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from qwen2_npu.conformance.report.charts.canvas import COLORS, Canvas, color


def made() -> str:
    canvas = Canvas(300, 100)
    axes = canvas.axes(30, 10, 240, 60)
    axes.barh(0, 3, color=color("documented"))
    axes.plot([1], [0], marker="o", color=color("bad"))
    axes.set_title("a title", color=color("text"))
    return canvas.svg("what it shows")


def test_colours_are_the_page_s_variables() -> None:
    svg = made()
    for name in ("documented", "bad", "text", "grid", "muted"):
        assert f"var(--{name})" in svg
    assert "#fe01" not in svg
    assert len({color(name) for name in COLORS}) == len(COLORS)


def test_an_element_of_the_page() -> None:
    svg = made()
    root = ElementTree.fromstring(svg)
    assert (root.get("width"), root.get("height"), root.get("role")) == ("300", "100", "img")
    assert root.get("aria-label") == "what it shows"
    assert "a title" in svg, "text stays text"
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert all(f"#{id}" in svg for id in ids), "ids that nobody uses would clash with another chart's"
    assert "metadata" not in svg


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert made() == made()
