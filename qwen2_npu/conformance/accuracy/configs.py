"""Shape-faithful small versions of the Qwen2 family, and random weights whose tokens are worth comparing.

What decides which operator runs, and how, is kept as in the real model: head_dim, grouped-query ratio, tied or untied
embeddings, rope_theta, rms_norm_eps. What only decides how long it takes is small: layers, vocabulary, MLP width and,
where transformers lets head_dim be given apart from it, the hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwen2_npu.compat import CONFIGURATIONS, is_sparse
from qwen2_npu.conformance.accuracy.stock import HEAD_DIM_IS_FREE

if TYPE_CHECKING:
    from transformers import Qwen2Config


@dataclass(frozen=True)
class Shape:
    """One member of the family: the published head layout and what else selects an operator."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    rope_theta: float = 1e6
    eps: float = 1e-6
    bound_heads: tuple[int, int] | None = None
    """(heads, kv_heads) where hidden_size must be heads·head_dim (transformers 4.37): same ratio, fewer heads,
    since products grow with the square of that size."""
    experts: int = 0
    """Of a mixture; two of them serve each token, as an eighth do in the published model."""


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("qwen2-0.5b", heads=14, kv_heads=2, head_dim=64, tied=True),
        Shape("qwen2-1.5b", heads=12, kv_heads=2, head_dim=128, tied=True),
        Shape("qwen2-7b", heads=28, kv_heads=4, head_dim=128, tied=False, bound_heads=(7, 1)),
        Shape("qwen2-72b", heads=64, kv_heads=8, head_dim=128, tied=False, bound_heads=(8, 1)),
        Shape("qwen1.5-0.5b", heads=16, kv_heads=16, head_dim=64, tied=True),
    )
}
if "qwen2_moe" in CONFIGURATIONS:
    SHAPES["qwen2-57b-a14b"] = Shape("qwen2-57b-a14b", heads=28, kv_heads=4, head_dim=128, tied=False, experts=16)
"""Name -> shape. From the published config.json files; all have rope_theta 1e6 and rms_norm_eps 1e-6."""

VOCAB_SIZE = 512
HIDDEN_SIZE = 256
LAYERS = 2


def small_config(name: str, *, layers: int = LAYERS, vocab_size: int = VOCAB_SIZE) -> Qwen2Config:
    """The small version of ``name``, as an ordinary ``Qwen2Config``.

    Where head_dim is free (transformers 5.x) all head counts are the real ones and hidden_size is 256. In 4.37 the
    hidden size is heads·head_dim, so the two largest models keep ratio and head_dim with fewer heads.

    Raises:
        ValueError: no shape of that name.
    """
    if name not in SHAPES:
        raise ValueError(f"no model shape {name!r}; there are {', '.join(SHAPES)}")
    shape = SHAPES[name]
    heads, kv_heads = (
        (shape.heads, shape.kv_heads) if HEAD_DIM_IS_FREE else (shape.bound_heads or (shape.heads, shape.kv_heads))
    )
    settings: dict[str, Any] = {"head_dim": shape.head_dim} if HEAD_DIM_IS_FREE else {}
    settings |= {"rope_theta": shape.rope_theta}  # 5.x moves it into rope_parameters
    if shape.experts:
        settings |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts // 8,
            "moe_intermediate_size": HIDDEN_SIZE // 4,
            "shared_expert_intermediate_size": 2 * HIDDEN_SIZE,
        }
    return CONFIGURATIONS["qwen2_moe" if shape.experts else "qwen2"](
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE if HEAD_DIM_IS_FREE else heads * shape.head_dim,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=shape.eps,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=256,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **settings,
    )


def random_state_dict(
    config: Qwen2Config, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Weights for ``config`` under the stock names, scaled so that a fault anywhere moves the logits.

    Transformers' own initialisation (std 0.02, zero biases) gives near-uniform attention and logits near zero: an
    inverted mask would hardly show. Here every linear keeps the variance of its input, q and k are a little larger so
    that attention is peaked, biases and norm weights are non-trivial, and logits have a standard deviation of about 4,
    which makes the margin between the two best tokens large against the rounding of any dtype at most positions.

    Values are rounded to ``dtype`` last; a float32 model and a bfloat16 model get different weights from the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    q_size, kv_size = config.num_attention_heads * head_dim, kv_heads * head_dim

    def normal(*size: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * std + mean).to(dtype)

    def linear(out_size: int, in_size: int, gain: float = 1.0) -> torch.Tensor:
        return normal(out_size, in_size, std=gain / math.sqrt(in_size))

    logit_std = 4.0
    state = {"model.embed_tokens.weight": normal(config.vocab_size, hidden, std=logit_std / math.sqrt(hidden))}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        state |= {
            layer + "input_layernorm.weight": normal(hidden, mean=1.0, std=0.2),
            layer + "self_attn.q_proj.weight": linear(q_size, hidden, gain=1.5),
            layer + "self_attn.q_proj.bias": normal(q_size, std=0.5),
            layer + "self_attn.k_proj.weight": linear(kv_size, hidden, gain=1.5),
            layer + "self_attn.k_proj.bias": normal(kv_size, std=0.5),
            layer + "self_attn.v_proj.weight": linear(kv_size, hidden),
            layer + "self_attn.v_proj.bias": normal(kv_size, std=0.5),
            layer + "self_attn.o_proj.weight": linear(hidden, q_size),
            layer + "post_attention_layernorm.weight": normal(hidden, mean=1.0, std=0.2),
        }
        mlps = {"mlp.": inner}
        if is_sparse(config, index):
            state[layer + "mlp.gate.weight"] = linear(config.num_experts, hidden, gain=1.5)
            state[layer + "mlp.shared_expert_gate.weight"] = linear(1, hidden, gain=1.5)
            mlps = {f"mlp.experts.{each}.": config.moe_intermediate_size for each in range(config.num_experts)}
            mlps["mlp.shared_expert."] = config.shared_expert_intermediate_size
        for scope, columns in mlps.items():
            state |= {
                layer + scope + "gate_proj.weight": linear(columns, hidden),
                layer + scope + "up_proj.weight": linear(columns, hidden),
                layer + scope + "down_proj.weight": linear(hidden, columns),
            }
    state["model.norm.weight"] = normal(hidden, mean=1.0, std=0.2)
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = linear(config.vocab_size, hidden, gain=logit_std)
    return state
