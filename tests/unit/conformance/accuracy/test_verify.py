"""The engine of `qwen2-npu verify`, where the command's own tests do not reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen2_npu.conformance.accuracy.verify import verify
from qwen2_npu.models.layers import MLP
from tests.unit.small import small_stock


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


def test_layer_by_layer_has_the_verdict_of_the_whole(tmp_path: Path) -> None:
    small_stock().save_pretrained(tmp_path, safe_serialization=True)
    said: list[tuple[str, int, int]] = []
    results = [
        verify(tmp_path, steps=["swiglu"], stream=stream, progress=lambda *what: said.append(what))
        for stream in (False, True)
    ]
    whole, layered = (result.to_dict() for result in results)
    assert whole["passed"]
    assert layered["passed"]
    assert (whole["streamed"], layered["streamed"]) == ("", "asked for")
    assert whole["reference_dtype"] == layered["reference_dtype"] == "float64"
    row, same = layered["rows"][0], whole["rows"][0]
    assert row["positions"] == same["positions"]
    for shape, batch in row["batches"].items():
        assert batch["paths"]["prefill"] == same["batches"][shape]["paths"]["prefill"]
    assert row["baseline_tokens_per_second"] is None
    assert same["baseline_tokens_per_second"] > 0
    assert ("stock model layer by layer: asked for", 0, 3) in said
    layers = [label for label, done, _ in said if ", layer " in label and done == 0]
    assert len(layers) == 3
    assert layers[0] == "stock model and float64 reference, layer 1 of 3"
    assert layers[1].endswith(" s per layer")
