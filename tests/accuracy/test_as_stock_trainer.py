"""transformers' Trainer: evaluate and predict as with the stock models; training is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from qwen2_npu import Optimizations, Qwen2ForCausalLM, Qwen2ForSequenceClassification
from qwen2_npu.errors import UnsupportedError
from tests.unit.small import small_config, small_stock, stock_weights

SWITCHES = {"none": Optimizations.none(), "all": Optimizations.all()}


@pytest.fixture
def trainer(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate, which is not installed")

    def make(model, rows):
        options = transformers.TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, max_steps=1, disable_tqdm=True
        )
        return transformers.Trainer(model=model, args=options, train_dataset=rows, eval_dataset=rows)

    return make


def rows_of(labels):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(5):
        ids = torch.randint(1, 199, (12,), generator=generator)
        mask = torch.ones(12, dtype=torch.int64)
        ids[:number], mask[:number] = 0, 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels(ids, number)})
    return rows


def next_tokens(ids, number):
    return ids.masked_fill(torch.arange(12) < max(number + 1, 3), -100)


@pytest.mark.parametrize("optimizations", SWITCHES.values(), ids=SWITCHES)
def test_evaluate_and_predict(trainer, optimizations):
    stock = small_stock()
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
    rows = rows_of(next_tokens)
    mine, theirs = (trainer(each, rows) for each in (model, stock))
    assert math.isclose(mine.evaluate()["eval_loss"], theirs.evaluate()["eval_loss"], rel_tol=1e-5)
    one, other = (each.predict(rows) for each in (mine, theirs))
    assert one.predictions.shape == (5, 12, 199)
    for row, mask in enumerate(each["attention_mask"].bool().numpy() for each in rows):
        assert np.abs(one.predictions[row] - other.predictions[row])[mask].max() < 5e-4
    assert math.isclose(one.metrics["test_loss"], other.metrics["test_loss"], rel_tol=1e-5)


def test_evaluate_a_classifier(trainer):
    stock = transformers.Qwen2ForSequenceClassification(small_config(num_labels=3)).eval()
    model = Qwen2ForSequenceClassification.from_state_dict(stock.config, stock.state_dict())
    rows = rows_of(lambda ids, number: number % 3)
    mine, theirs = (trainer(each, rows).predict(rows) for each in (model, stock))
    assert np.abs(mine.predictions - theirs.predictions).max() < 1e-4
    assert math.isclose(mine.metrics["test_loss"], theirs.metrics["test_loss"], rel_tol=1e-4)


def test_training_is_refused(trainer):
    stock = small_stock()
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock))
    with pytest.raises(UnsupportedError, match=r"this model is for inference, .*: train the stock model and load"):
        trainer(model, rows_of(next_tokens)).train()


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen2ForSequenceClassification"])
def test_a_training_step_without_trainer(name):
    """The loss of a model in training mode would be one without gradients. A prompt may be trained, and losses seen."""
    stock = getattr(transformers, name)(small_config(num_labels=3))
    cls = {"Qwen2ForCausalLM": Qwen2ForCausalLM}.get(name, Qwen2ForSequenceClassification)
    model = cls.from_state_dict(stock.config, stock.state_dict())
    ids = torch.arange(1, 9)[None]
    labels = ids if name == "Qwen2ForCausalLM" else torch.tensor([1])
    assert torch.isfinite(model(ids, labels=labels).loss)
    model.train()
    with pytest.raises(UnsupportedError, match="this model is for inference"):
        model(ids, labels=labels)
    with torch.no_grad():
        assert torch.isfinite(model(ids, labels=labels).loss)
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeds, labels=labels, use_cache=False).loss.backward()
    assert torch.isfinite(embeds.grad).all()
    assert model.accepts_loss_kwargs is False
