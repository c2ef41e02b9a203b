"""Charts as SVG inside the page, without scripts, fonts or files of their own.

Colours are the page's own CSS variables, so that a chart follows light and dark. Chinese names stand in the page's
HTML, row by row beside the bars: an SVG cannot carry the font.
"""

from __future__ import annotations
