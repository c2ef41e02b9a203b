"""One rank measures what its job was asked for. Jobs of real ranks are in tests/perf/test_several_cards.py."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_npu.conformance.perf import builds, protocol
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.rank import measured
from qwen2_npu.conformance.perf.rows import Configuration

SAID = Measurement(5.0, (2.0,), (), (0, 4), 4, 1)


@pytest.mark.parametrize("path", ["/merged/here", None], ids=["checkpoint", "random"])
def test_a_rank_measures_what_it_was_asked_for(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    what = Configuration("72B", 8, 16, "graph", "fused_qkv")

    class Weights:
        description = "guide"

        def build(self, configuration: Configuration, device: str) -> str:
            said.append((configuration, device))
            return "the model"

    def of(*given: Any) -> Weights:
        said.append(given)
        return Weights()

    def measure(model: str, **how: Any) -> Measurement:
        said.append((model, how))
        return SAID

    monkeypatch.setattr(builds.Weights, "of", of)
    monkeypatch.setattr(protocol, "measure", measure)
    request = {"configuration": asdict(what), "model_path": path, "assume_tp": 4, "decode_steps": 77}
    group: Any = SimpleNamespace(device="cpu", rank=0)
    assert measured(request, group) == {"verified": "cpu (portable kernels)", "measurement": asdict(SAID)}
    assert said == [
        ("72B", path and Path(path), 4),
        (what, "cpu"),
        ("the model", {"batch": 16, "decode_steps": 77, "weights": "guide"}),
    ]
