"""The engine of `qwen2-npu verify`, where the command's own tests do not reach."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.conformance.accuracy.verify import verify
from qwen2_npu.models.layers import MLP


@pytest.mark.slow
def test_a_failure_of_a_compiled_model_is_explained(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the uncompiled one: steps taken off one by one, down to a model that cannot be compiled for an NPU."""
    right = MLP.forward

    def wrong(self: MLP, x: torch.Tensor) -> torch.Tensor:
        return right(self, x) * 1.1

    monkeypatch.setattr(MLP, "forward", wrong)
    result = verify(device=device, steps=["swiglu"], mode="torchair" if device.startswith("npu") else "inductor")
    assert not result.passed
    assert "with every optimisation off, layer" in result.rows[0].explanation
