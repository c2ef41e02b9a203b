"""What holds while a compiled step runs, and no longer."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from qwen2_npu.cache import round_prompt
from qwen2_npu.graph import steps
from qwen2_npu.graph.steps import CompiledStep
from qwen2_npu.models.attention import AttentionInputs

INPUTS = AttentionInputs(position_ids=torch.arange(8)[None])


def settings() -> dict[str, object]:
    """Of dynamo and autograd."""
    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    return {
        "graphs": dynamo.recompile_limit,
        "graphs of all": dynamo.accumulated_recompile_limit,
        "floats are constants": dynamo.specialize_float,
        "kept on disk": functorch.enable_autograd_cache,
        "gradients": torch.is_grad_enabled(),
    }


def test_a_step_runs_under_settings_of_its_own():
    seen = []
    before = settings()
    step = CompiledStep(lambda *given: None, lambda call: lambda *given: seen.append(settings()))
    with torch.enable_grad():
        step(torch.ones(1, 8, dtype=torch.int64), INPUTS, [])
    (within,) = seen
    assert settings() == before
    assert within["floats are constants"] is True
    assert within["kept on disk"] is False
    assert within["gradients"] is False
    # One graph for each prompt bucket of 16 batch sizes; beyond the limit dynamo would run eagerly without a word.
    buckets = {round_prompt(tokens, 1 << 20) for tokens in range(1, 32769)}
    assert within["graphs"] > 16 * len(buckets)
    assert within["graphs of all"] > 4 * within["graphs"]


def test_a_step_that_fails_leaves_no_setting_behind():
    """As one that the compiler refuses: the caller may go on without graphs."""

    def fail(*given: object) -> torch.Tensor:
        raise RuntimeError("no such operator")

    step = CompiledStep(lambda *given: None, lambda call: fail)
    with torch.enable_grad():
        before = settings()
        with pytest.raises(RuntimeError, match="no such operator"):
            step(torch.ones(1, 8, dtype=torch.int64), INPUTS, [])
        assert settings() == before


@pytest.mark.parametrize("index", [None, torch.arange(12).reshape(2, 6)[:, 1:3]], ids=["all", "some"])
def test_what_a_step_is_given_has_one_form(index):
    """Slices of growing tensors have other strides every step, which would be other graphs."""
    growing = torch.arange(40).reshape(2, 20)
    seen = []
    step = CompiledStep(lambda *given: None, lambda call: lambda *given: seen.append(given))
    inputs = AttentionInputs(growing[:, 5:9], actual_seq_lengths=[4, 9])
    caches = [(torch.zeros(2, 128, 1, 4), torch.zeros(2, 128, 1, 4))]
    step(growing[:, 3:7], inputs, caches, index)
    tokens, found, kept, wanted = seen.pop()
    assert torch.equal(tokens, growing[:, 3:7])
    assert torch.equal(found.position_ids, growing[:, 5:9])
    assert found.actual_seq_lengths == [4, 9]
    assert kept is caches  # written where they are
    assert wanted is None if index is None else torch.equal(wanted, index)
    tensors = [tokens, found.position_ids, *caches[0], *([] if wanted is None else [wanted])]
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert hasattr(tensor, steps.MARK), "not marked as static"
    assert not hasattr(growing, steps.MARK)


def test_caches_are_marked_once(monkeypatch):
    """They come back every step, which would spend more of the host's time on marks than on all the rest."""
    marked, mark = [], torch._dynamo.mark_static
    monkeypatch.setattr(torch._dynamo, "mark_static", lambda tensor: marked.append(tensor) or mark(tensor))
    step = CompiledStep(lambda *given: None, lambda call: lambda *given: None)
    caches = [(torch.zeros(1, 128, 1, 4), torch.zeros(1, 128, 1, 4))]
    counts = []
    for _ in range(2):
        step(torch.ones(1, 8, dtype=torch.int64), INPUTS, caches)
        counts.append([sum(each is tensor for each in marked) for tensor in caches[0]])
    assert counts == [[1, 1], [1, 1]]
    assert len(marked) == 2 + 2 * 2  # tokens and positions are new each time


@pytest.mark.parametrize("number", [0, 3])
def test_a_step_runs_on_the_card_of_its_tokens(number, monkeypatch):
    entered = []

    @contextmanager
    def card(device):
        entered.append(device)
        yield
        entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", card)
    with steps.current_card(torch.device("cuda", number)):
        assert entered == [torch.device("cuda", number)]
    assert entered.pop() is None
    with steps.current_card(torch.device("cpu")):
        assert len(entered) == 1
    monkeypatch.setattr(steps, "current_card", card)
    seen = []
    step = CompiledStep(lambda *given: None, lambda call: lambda *given: seen.append(entered[-1]))
    step(torch.ones(1, 8, dtype=torch.int64), INPUTS, [])
    assert seen == [torch.device("cpu")]
    assert entered[-1] is None
