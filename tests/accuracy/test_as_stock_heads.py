"""Hidden states and scores of the models with other heads, on padded batches: within the stock model's own noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

import qwen2_npu
from qwen2_npu import Optimizations, Qwen2ForCausalLM, Qwen2Model
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.noise import Array, error_ratio
from qwen2_npu.conformance.accuracy.stock import exact, exact_reference

DTYPE = torch.bfloat16
LABELS = 7
SWITCHES = {"none": Optimizations.none(), "all": Optimizations.all()}
HEADS = [
    name for name in ("Qwen2ForSequenceClassification", "Qwen2ForTokenClassification") if hasattr(transformers, name)
]


def array(tensor: torch.Tensor) -> Array:
    numbers: Array = tensor.detach().to("cpu", torch.float64).numpy()
    return numbers


@pytest.fixture(scope="module", params=["left", "right"])
def batch(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """Rows of 24 down to 3 tokens. The padding is token 0, which is nowhere else."""
    ids = torch.randint(1, 200, (8, 24), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(24) >= 3 * torch.arange(8)[:, None]).long()
    mask = mask if request.param == "left" else mask.flip(1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}


@pytest.fixture(scope="module")
def stock() -> Any:
    return transformers.Qwen2ForCausalLM.from_pretrained(
        tiny.path(), torch_dtype=DTYPE, attn_implementation="eager", pad_token_id=0
    ).eval()


@pytest.fixture(scope="module")
def exact_hidden(stock: Any, batch: dict[str, torch.Tensor]) -> Array:
    reference = exact_reference(stock, torch.float64)
    with torch.no_grad(), exact(reference):
        return array(reference(**batch, output_hidden_states=True, use_cache=False).hidden_states[-1])


def on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
@pytest.mark.parametrize("optimizations", SWITCHES.values(), ids=SWITCHES)
def test_hidden_states(stock: Any, batch: Any, exact_hidden: Array, optimizations: Any, device: str) -> None:
    valid = batch["attention_mask"].bool().numpy()
    baseline = array(stock.get_decoder()(**batch).last_hidden_state)
    ours = Qwen2Model.from_pretrained(tiny.path(), dtype=DTYPE, device=device, optimizations=optimizations)
    model = Qwen2ForCausalLM.from_pretrained(tiny.path(), dtype=DTYPE, device=device, optimizations=optimizations)
    found = array(ours(**on(device, batch)).last_hidden_state)
    assert error_ratio(found[valid], baseline[valid], exact_hidden[valid], DTYPE).within
    assert np.array_equal(array(model.get_decoder()(**on(device, batch))[0])[valid], found[valid])
    before = array(ours(**on(device, batch), output_hidden_states=True).hidden_states[-2])  # one layer and a norm less
    assert not error_ratio(before[valid], baseline[valid], exact_hidden[valid], DTYPE).within


@torch.no_grad()
@pytest.mark.parametrize("optimizations", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("name", HEADS)
def test_scores(stock: Any, batch: Any, exact_hidden: Array, optimizations: Any, name: str, device: str) -> None:
    config = type(stock.config).from_pretrained(tiny.path(), num_labels=LABELS, pad_token_id=0)
    config._attn_implementation = "eager"
    torch.manual_seed(6)
    theirs = getattr(transformers, name)(config).to(DTYPE).eval()
    theirs.model.load_state_dict(stock.model.state_dict())
    theirs.score.weight.normal_(0, 0.1)
    state = theirs.state_dict()
    exact_scores = exact_hidden @ array(theirs.score.weight).T
    if theirs.score.bias is not None:
        exact_scores = exact_scores + array(theirs.score.bias)
    ours = getattr(qwen2_npu, name).from_state_dict(config, state, device=device, optimizations=optimizations)
    found, baseline = array(ours(**on(device, batch)).logits), array(theirs(**batch).logits)
    if name == "Qwen2ForSequenceClassification":
        last = (batch["attention_mask"] * torch.arange(24)).argmax(-1).numpy()
        exact_scores = exact_scores[np.arange(8), last]
    else:
        valid = batch["attention_mask"].bool().numpy()
        found, baseline, exact_scores = found[valid], baseline[valid], exact_scores[valid]
    assert error_ratio(found, baseline, exact_scores, DTYPE).within
    assert not error_ratio(np.roll(found, 1, axis=0), baseline, exact_scores, DTYPE).within
