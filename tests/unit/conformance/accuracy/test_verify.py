"""The engine of `qwen2-npu verify`, where the command's own tests do not reach."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.verify import verify
from qwen2_npu.models.layers import MLP


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "layer by layer"])
def test_a_failure_of_a_compiled_model_is_explained(stream: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the uncompiled one: steps taken off one by one, down to a model that cannot be compiled for an NPU."""
    right = MLP.forward

    def wrong(self: MLP, x: torch.Tensor) -> torch.Tensor:
        return right(self, x) * 1.1

    monkeypatch.setattr(MLP, "forward", wrong)
    mode = "torchair" if device.startswith("npu") else "inductor"
    torch._dynamo.reset()
    result = verify(device=device, steps=["swiglu"], mode=mode, stream=stream)
    assert not result.passed
    assert "with every optimisation off, layer" in result.rows[0].explanation


def test_layer_by_layer_has_the_verdict_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tiny.prompts()[:1]
    monkeypatch.setattr(tiny, "prompts", lambda: prompts)
    said: list[tuple[str, int, int]] = []
    results = [
        verify(device="cpu", steps=["swiglu"], stream=stream, progress=lambda *what: said.append(what))
        for stream in (False, True)
    ]
    whole, layered = (result.to_dict() for result in results)
    assert whole["passed"]
    assert layered["passed"]
    for name in ("perplexity", "samples", "reference_dtype", "dtype"):
        assert whole[name] == layered[name], name
    assert [result.streamed for result in results] == ["", "asked for"]
    assert [result.rows[0].positions for result in results] == [results[0].rows[0].positions] * 2
    assert layered["rows"][0]["baseline_tokens_per_second"] is None
    assert ("stock model layer by layer: asked for", 0, 3) in said
    layers = [label for label, _, _ in said if ", layer " in label]
    assert layers[0] == "stock model and float64 reference, layer 1 of 4"
    assert layers[4] == "perplexity and greedy text, layer 1 of 4"
    assert len(layers) == 8
