"""GE operators behind the npu:: operators of this project; the arithmetic is that of ``qwen2_npu.ops``."""

from __future__ import annotations

from qwen2_npu import ops
from qwen2_npu.emulator.ge.operators.table import Ints, Tensor, operator


@operator("RmsNorm")
def rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return ops.kernels["npu_rms_norm"](x, gamma, epsilon)


@operator("AddRmsNorm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    return ops.kernels["npu_add_rms_norm"](x1, x2, gamma, epsilon)


@operator("ApplyRotaryPosEmb", fixed={"layout": 1})
def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    # Layout 1 is BSND, the only one on this card.
    return ops.kernels["npu_apply_rotary_pos_emb"](query, key, cos, sin, "BSND", rotary_mode)


@operator("RotaryMul")
def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    return ops.kernels["npu_rotary_mul"](x, r1, r2)


@operator("SwiGlu")
def swiglu(x: Tensor, *, dim: int = -1) -> Tensor:
    return ops.kernels["npu_swiglu"](x, dim)


def _one(tensors: list[Tensor]) -> Tensor:
    """The operators take a list of tensors for cases that are not emulated.

    Raises:
        ValueError: there are several.
    """
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} keys or values: one tensor of each is emulated")
    return tensors[0]


def _lengths(given: Ints | None) -> list[int] | None:
    return None if given is None else list(given)


# What the operators' lists of optional inputs hold beyond these (quantisation, paging, position shifts) is refused by
# name when a graph is loaded. GE's tensors are dense; the engine's may be views.


@operator("PromptFlashAttention")
def prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None,
    actual_seq_lengths: Ints | None,
    actual_seq_lengths_kv: Ints | None,
    *,
    num_heads: int,
    scale_value: float = 1.0,
    pre_tokens: int = 214748647,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 1,
    sparse_mode: int = 0,
    inner_precise: int = 1,
) -> Tensor:
    # inner_precise chooses how hardware computes in fp16; here it is fp32 in any case.
    return ops.kernels["npu_prompt_flash_attention"](
        query.contiguous(), key.contiguous(), value.contiguous(), atten_mask=atten_mask,
        actual_seq_lengths=_lengths(actual_seq_lengths), actual_seq_lengths_kv=_lengths(actual_seq_lengths_kv),
        num_heads=num_heads, scale_value=scale_value, pre_tokens=pre_tokens, next_tokens=next_tokens,
        input_layout=input_layout, num_key_value_heads=num_key_value_heads, sparse_mode=sparse_mode,
    )  # fmt: skip


@operator("IncreFlashAttention", fixed={"block_size": 0})
def incre_flash_attention(
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    atten_mask: Tensor | None,
    actual_seq_lengths: Ints | None,
    kv_padding_size: Tensor | None,
    *,
    num_heads: int,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 1,
    inner_precise: int = 1,
) -> Tensor:
    return ops.kernels["npu_incre_flash_attention"](
        query.contiguous(), _one(key), _one(value), atten_mask=atten_mask,
        actual_seq_lengths=_lengths(actual_seq_lengths), kv_padding_size=kv_padding_size, num_heads=num_heads,
        scale_value=scale_value, input_layout=input_layout, num_key_value_heads=num_key_value_heads,
        inner_precise=inner_precise,
    )  # fmt: skip


@operator(
    "FusedInferAttentionScore",
    fixed={
        "block_size": 0, "antiquant_mode": 0, "key_antiquant_mode": 0, "value_antiquant_mode": 0,
        "query_quant_mode": 0, "pse_type": 0, "out_dtype": 0,
    },
)  # fmt: skip
def fused_infer_attention_score(
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    atten_mask: Tensor | None,
    actual_seq_lengths: Ints | None,
    actual_seq_lengths_kv: Ints | None,
    kv_padding_size: Tensor | None,
    *,
    num_heads: int,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    return ops.kernels["npu_fused_infer_attention_score"](
        query.contiguous(), _one(key).contiguous(), _one(value).contiguous(), atten_mask=atten_mask,
        actual_seq_lengths=_lengths(actual_seq_lengths), actual_seq_lengths_kv=_lengths(actual_seq_lengths_kv),
        kv_padding_size=kv_padding_size, num_heads=num_heads, scale=scale, pre_tokens=pre_tokens,
        next_tokens=next_tokens, input_layout=input_layout, num_key_value_heads=num_key_value_heads,
        sparse_mode=sparse_mode, inner_precise=inner_precise, softmax_lse_flag=softmax_lse_flag,
    )  # fmt: skip
