"""What Qwen2 reaches, in training and in generation, is not among the operators for other programs."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config
from transformers import Qwen2ForCausalLM as Stock

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.emulator.eager import operators, tap
from qwen2_npu.emulator.eager.operators import beyond_qwen2

BEYOND = {name for family in beyond_qwen2.FAMILIES for name in family.TABLE}


def config() -> Qwen2Config:
    found = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
    )
    found._attn_implementation = "sdpa"
    return found


@pytest.fixture
def reached(monkeypatch):
    """The names, with overloads, of the operators that reach the rule meanwhile."""
    found: set[str] = set()

    def listen(plan, run, args, kwargs):
        found.add(plan.op.name().partition("::")[2].removesuffix(".default"))
        return run(*args, **kwargs)

    monkeypatch.setattr(tap, "listeners", [*tap.listeners, listen])
    return found


def train(ids: torch.Tensor) -> None:
    model = Stock(config()).to("npu", torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def generate(ids: torch.Tensor) -> None:
    model = Qwen2ForCausalLM(config(), optimizations=Optimizations.all()).to("npu", torch.bfloat16).eval()
    model.generate(ids, max_new_tokens=3, do_sample=True, top_k=5, top_p=0.9, pad_token_id=0)


@pytest.mark.parametrize(
    ("program", "expected"),
    [(train, {"npu_fusion_attention_v3", "matmul_backward"}), (generate, {"npu_incre_flash_attention"})],
)
def test_qwen2_reaches_none_of_them(program, expected, reached):
    program(torch.arange(8, device="npu").view(1, 8))
    assert expected <= reached
    assert not reached & BEYOND


def test_a_program_that_does_is_seen(reached):
    torch.ops.npu.npu_gelu_mul(torch.ones(2, 4, device="npu"))
    assert reached & BEYOND == {"npu_gelu_mul"}


def test_both_parts_are_in_the_table():
    assert operators.TABLE.keys() > BEYOND
