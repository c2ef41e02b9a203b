"""One generate call per configuration, and what cannot be measured."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.perf import documented, protocol, runner
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.perf.runner import DeviceRunner, Request
from qwen2_npu.conformance.sizes import SIZES

SEVEN = Configuration("7B", 1, 4, "eager", "swiglu")


def test_both_phases_share_one_generate_call_and_batches_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, built = [], []

    def measure(model: Any, **settings: Any) -> Any:
        measured.append(settings)
        return object()

    def build(self: Any, configuration: Configuration, device: str) -> Any:
        built.append((configuration.step, device))
        return object()

    monkeypatch.setattr(protocol, "measure", measure)
    monkeypatch.setattr("qwen2_npu.conformance.perf.builds.Weights.build", build)
    bench = DeviceRunner(Request("cpu", decode_steps=7))
    one = bench.measured(SEVEN)
    assert bench.measured(SEVEN) is one
    other = bench.measured(Configuration("7B", 1, 8, "eager", "swiglu"))
    assert other is not one
    assert built == [("swiglu", "cpu")]
    assert measured == [
        {"batch": 4, "weights": "random", "decode_steps": 7},
        {"batch": 8, "weights": "random", "decode_steps": 7},
    ]
    bench.measured(Configuration("7B", 1, 8, "eager", "original"))
    assert built[1:] == [("original", "cpu")]


def test_what_cannot_be_measured() -> None:
    everything, half = DeviceRunner(Request("cpu")), DeviceRunner(Request("cpu", random_weights="0.5B"))
    assert everything.why_not(SEVEN) is None
    assert half.why_not(SEVEN) == "needs the 7B model: 0.5B was asked for"
    eight = Configuration("72B", 8, 4, "graph", "fused_qkv")
    assert everything.why_not(eight) == "needs tensor parallel: 72B runs on 8 cards"
    assert (half.model_name, everything.model_name) == ("0.5B", None)
    assert everything.size(SEVEN) is SIZES["7B"]


def test_every_row_on_several_cards_needs_tensor_parallel_and_no_other() -> None:
    bench = DeviceRunner(Request("cpu"))
    for what in {number.row.configuration for number in documented.read()}:
        several = "needs tensor parallel: 72B runs on 8 cards" if what.cards > 1 else None
        assert bench.why_not(what) == several


def test_a_checkpoint_is_measured_for_real() -> None:
    bench = DeviceRunner(Request("cpu", model_path=tiny.path(), decode_steps=2))
    name = bench.model_name
    assert name == tiny.path().name
    configuration = Configuration(name, 1, 1, "eager", "swiglu")
    found = bench.measured(configuration)
    assert found.weights == name
    assert (len(found.decode_ms), found.contexts) == (2, (0, 1024, 1025))
    assert bench.size(configuration).name == name
    assert bench.fingerprint.identity["device"] == "cpu"


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection takes half a second in a process with everything loaded."""
    monkeypatch.setattr(runner.gc, "collect", lambda: 0)
