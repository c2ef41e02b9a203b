"""The engine of `qwen2-npu verify`, where the command's own tests do not reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qwen2_npu.conformance.accuracy.verify as module
from qwen2_npu.conformance.accuracy.verify import verify
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models.layers import MLP
from qwen2_npu.optimizations import LADDER
from tests.unit.small import small_stock


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "layer by layer"])
def test_a_failure_of_a_compiled_model_is_explained(stream: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the uncompiled one: steps taken off one by one, down to a model that cannot be compiled for an NPU."""
    right = MLP.forward

    def wrong(self: MLP, *given: Any) -> torch.Tensor:
        return right(self, *given) * 1.1

    monkeypatch.setattr(MLP, "forward", wrong)
    mode = "torchair" if device.startswith("npu") else "inductor"
    torch._dynamo.reset()
    result = verify(device=device, steps=["swiglu"], mode=mode, stream=stream)
    assert not result.passed
    assert "with every optimisation off, layer" in result.rows[0].explanation


# ---- steps that only several ranks have -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ranks", "device", "dtype", "steps", "left_out"),
    [
        (1, "cpu", "auto", LADDER, ""),
        (2, "cpu", "float32", (*LADDER, "mm_all_reduce"), ""),
        (4, "npu:0", "bfloat16", (*LADDER, "mm_all_reduce"), ""),
        (8, "npu:0", "auto", (*LADDER, "mm_all_reduce"), ""),
        (2, "npu:1", "float32", LADDER, "mm_all_reduce takes no float32 on an NPU"),
        (3, "cpu", "auto", LADDER, "mm_all_reduce takes 2, 4, 8 ranks, and there are 3"),
    ],
)
def test_the_steps_by_default(
    ranks: int, device: str, dtype: str, steps: tuple[str, ...], left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rank_count", lambda: ranks)
    assert module._steps(None, None, device, dtype) == (steps, left_out)
    assert module._steps(["swiglu"], None, device, dtype) == (["swiglu"], "")


@pytest.mark.parametrize(
    ("ranks", "device", "message"),
    [
        (1, "cpu", "takes 2, 4, 8 ranks, and there is 1; leave it out, or start as many"),
        (3, "cpu", "takes 2, 4, 8 ranks, and there are 3; leave it out, or start as many"),
        (2, "npu:0", "takes no float32 on an NPU; leave it out, or take --dtype bfloat16"),
    ],
)
def test_a_step_that_cannot_be_had_is_refused_before_any_work(
    ranks: int, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rank_count", lambda: ranks)
    monkeypatch.setattr(module, "pair_of_checkpoint", lambda *_, **__: pytest.fail("the stock model was made first"))
    with pytest.raises(UnsupportedError, match=f"^--steps swiglu,mm_all_reduce: mm_all_reduce {message}"):
        verify(device=device, dtype="float32", steps=["swiglu", "mm_all_reduce"])


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
