"""What Qwen2 reaches is not among the operators for other programs; of those, which round once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config
from transformers import Qwen2ForCausalLM as Stock

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.emulator.eager import operators, tap
from qwen2_npu.emulator.eager.operators import beyond_qwen2
from tests.unit.emulator.eager.operators.harness import draw

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


npu = torch.ops.npu
MASK = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.3
TARGET, PLACES = torch.arange(8) % 5, torch.arange(8, dtype=torch.int32).flip(0)

FAMILIES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "gemma": lambda x, w: npu.npu_gemma_rms_norm(x, w),
    "rms": lambda x, w: npu.npu_rms_norm_backward(x, x.flip(0), w, x[:, :1].float().abs())[0],
    "layer": lambda x, w: npu.npu_add_layer_norm(x, x.flip(0), w, w, 1e-5, True),
    "deep": lambda x, w: npu.npu_deep_norm(x, x.flip(0), w, w, 0.3),
    "group": lambda x, w: npu.npu_group_norm_silu(x.view(1, 8, 8), w, w, 2)[0],
    "batch": lambda x, w: npu.batch_norm_reduce(x.view(2, 4, 8), 1e-5),
    "softmax": lambda x, w: npu.npu_scaled_masked_softmax(x.view(1, 1, 8, 8), MASK.npu(), 0.3),
    "swiglu": lambda x, w: npu.npu_clipped_swiglu(x),
    "unpermute": lambda x, w: npu.npu_moe_token_unpermute(x, PLACES.npu(), torch.stack([w[:4]] * 2, 1)),
    "rotary": lambda x, w: npu.npu_rotary_mul_backward(*(x.roll(n, 0).view(1, 8, 1, 8) for n in range(4))),
    "entropy": lambda x, w: npu.npu_cross_entropy_loss(x, TARGET.npu(), w)[:2],
    "labels": lambda x, w: npu.npu_softmax_cross_entropy_with_logits(x, x.abs()),
    "labels, gradient": lambda x, w: npu.npu_softmax_cross_entropy_with_logits_backward(w, x, x.abs()),
    "top p": lambda x, w: npu.npu_top_k_top_p(x, w.abs().clamp(0.3, 0.9), None),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_in_fp32_is_rounded_once(family: str, dtype: torch.dtype) -> None:
    """In halves it is what fp32 gives of the same numbers, bit for bit."""
    x, weight = draw(8, 8, dtype=dtype, grad=False).npu(), draw(8, dtype=dtype, grad=False).npu()
    found, wide = (tree_leaves(FAMILIES[family](*values)) for values in ((x, weight), (x.float(), weight.float())))
    for one, other in zip(found, wide, strict=True):
        assert torch.equal(one, other.to(one.dtype))
