"""What a run found, in files: JSON that is whole or absent, the history of runs, and one HTML page of it all.

Reading order: ``claims`` (what a run can confirm or refute), the readers ``accuracy``, ``graphs``, ``latency``,
``suites`` and ``stages`` (inputs to claims), ``results`` (all of them), ``history`` and ``changes`` (what regressed
since which commit), ``charts`` and ``page`` (what is seen), ``summary`` (the same in a few lines of Markdown).
"""

from __future__ import annotations

from qwen2_npu.conformance.files import check_writable, write_json, write_text

__all__ = ["check_writable", "write_json", "write_text"]
