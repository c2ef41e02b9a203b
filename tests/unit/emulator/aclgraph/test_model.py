"""A decode step of the model, captured by hand with torch_npu's own interface."""

from __future__ import annotations

from typing import Any

import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from tests.unit.small import small_config
from tests.unit.tokens import assert_same_tokens

Tensor = torch.Tensor
STEPS = 5


class Captured:
    """Stands in for ``decode_step``: captured at its first call, replayed on the same memory from then on."""

    def __init__(self, step: Any) -> None:
        self.step = step
        self.graph = torch.npu.NPUGraph()
        self.static: list[Tensor] = []
        self.logits = torch.empty(0)

    def __call__(self, tokens: Tensor, inputs: Any, caches: Any) -> Tensor:
        given = [tokens, *(value for value in inputs if isinstance(value, Tensor))]
        if not self.static:
            self.static = [value.clone() for value in given]
            left = iter(self.static)
            own_tokens = next(left)
            own_inputs = type(inputs)(*(next(left) if isinstance(value, Tensor) else value for value in inputs))
            with torch.npu.graph(self.graph):
                self.logits = self.step(own_tokens, own_inputs, caches)
        for static, value in zip(self.static, given, strict=True):
            static.copy_(value)
        self.graph.replay()
        return self.logits.clone()


def generate(model: Qwen2ForCausalLM) -> Tensor:
    prompt = torch.arange(1, 9).reshape(1, 8).repeat(2, 1).npu()
    cache = model.allocate_cache(2, 24)
    tokens = [model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)]
    for _ in range(STEPS):
        tokens.append(model(tokens[-1], past_key_values=cache).logits.argmax(-1))
    return torch.cat(tokens, 1).cpu()


@torch.no_grad()
def test_replayed_steps_give_eagers_tokens() -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(small_config(num_hidden_layers=2), Optimizations.up_to("fused_qkv"))
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    model.npu()
    expected = generate(model)
    model.compiled_steps = {"decode": Captured(model.decode_step)}
    assert_same_tokens(generate(model), expected)
    assert len({tuple(column) for column in expected.T.tolist()}) > 2  # a step that repeated itself would be seen
