import re
from pathlib import Path

from qwen2_npu.conformance import report
from qwen2_npu.conformance.report.charts import rows


def test_rows_are_as_high_as_the_page_s_labels() -> None:
    style = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    assert re.search(rf"\.rows > div {{ height: {rows.ROW}px;", style)
    assert re.search(rf"\.rows {{ [^}}]*margin-top: {rows.TOP}px;", style)


def test_the_first_row_is_on_top() -> None:
    canvas, axes = rows.canvas(3, 400)
    assert canvas.height == rows.TOP + 3 * rows.ROW + rows.BOTTOM
    top, bottom = (axes.transData.transform((0, y))[1] for y in (0, 2))
    assert top > bottom
    assert top - bottom == 2 * rows.ROW
