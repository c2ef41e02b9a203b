"""GE graphs of the model, without weights and without an NPU: lowering, census, invariants and cost."""

from __future__ import annotations
