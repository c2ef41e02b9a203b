"""The operators once more, in plain torch, independent of kernels and goldens, each able to go wrong in named ways.

Every function takes the name of a fault first; "" is none.
"""

# ruff: noqa: N806  (dimensions are spelled as in the documentation)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.unit.conformance.operators import plain_experts, plain_quantized

Tensors = dict[str, Any]


def rms(x: torch.Tensor, epsilon: float, fault: str) -> torch.Tensor:
    if fault == "epsilon_changed":
        epsilon = 1e-5 if epsilon != 1e-5 else 1e-6
    if fault == "epsilon_outside_the_root":
        return 1 / (x.float().square().mean(-1, keepdim=True).sqrt() + epsilon)
    mean = x.float().square().sum(-1, keepdim=True) / (x.shape[-1] - (fault == "divided_by_width_minus_one"))
    return 1 / (mean + epsilon).sqrt()


def rms_norm(fault: str, input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Any:
    rstd = rms(input, epsilon, fault)
    if fault == "gamma_ignored":
        gamma = torch.ones_like(gamma)
    normal = input.float() * rstd
    if fault == "rounded_before_gamma":
        normal = normal.to(input.dtype).float()
    y = (normal * gamma.float()).to(input.dtype)
    return y, rstd.to(input.dtype) if fault == "rstd_in_the_dtype" else rstd


def add_rms_norm(fault: str, x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Any:
    wide = x1.float() + x2.float()
    x = wide.to(x1.dtype)
    rstd = rms(wide if fault == "rstd_from_unrounded_x" else x, epsilon, fault)
    normal = (wide if fault == "y_from_unrounded_x" else x).float() * rstd
    if fault != "not_rounded_before_gamma":
        normal = normal.to(x.dtype).float()
    y = (normal * gamma.float()).to(x.dtype)
    return y, rstd, x1.clone() if fault == "residual_not_added" else x


def rotate(fault: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    if fault == "halves_swapped":
        turned = torch.cat([second, -first], dim=-1)
    elif fault == "interleaved":
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        turned = torch.cat([-second, first], dim=-1)
    if fault == "cos_and_sin_swapped":
        cos, sin = sin, cos
    if fault == "position_off_by_one":
        cos, sin = cos.roll(1, dims=1), sin.roll(1, dims=1)
    if fault == "first_half_of_the_table_used_twice":
        cos, sin = (torch.cat([table.chunk(2, -1)[0]] * 2, -1) for table in (cos, sin))
    return x * cos + turned * sin


def rotary_mul(fault: str, input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half") -> Any:
    made = rotate(fault, input, r1, r2)
    return input.copy_(made) if fault == "in_place" else made


def apply_rotary_pos_emb(
    fault: str, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: str
) -> Any:
    turned = rotate(fault, query, cos, sin), rotate(fault, key, cos, sin)
    if fault == "out_of_place":
        return turned
    return query.copy_(turned[0]), key if fault == "key_forgotten" else key.copy_(turned[1])


def scatter(fault: str, input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, axis: int) -> torch.Tensor:
    size, length = input.shape[axis], updates.shape[axis]
    for row, start in enumerate(indices.tolist()):
        if fault == "one_slot_off":
            start = start + 1 if start + length < size else max(start - 1, 0)
        if fault == "first_index_for_every_row":
            start = int(indices[0])
        if fault == "one_slot_short":
            length = max(updates.shape[axis] - 1, 1)
        input[row].unsqueeze(0).narrow(axis, start, length).copy_(updates[row].unsqueeze(0).narrow(axis, 0, length))
    if fault == "clears_the_rest" and int(indices[0]) > 0:
        input[0].unsqueeze(0).narrow(axis, 0, 1).zero_()
    return input


def scatter_update_(fault: str, input: torch.Tensor, **rest: Any) -> Any:
    return scatter(fault, input.clone() if fault == "out_of_place" else input, **rest)


def scatter_update(fault: str, input: torch.Tensor, **rest: Any) -> Any:
    return scatter(fault, input if fault == "in_place" else input.clone(), **rest)


def paged(
    fault: str, key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
    slot_mapping: torch.Tensor, cache_mode: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    block = key_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if fault == "one_slot_off":
            slot = slot + 1 if slot + 1 < key_cache.shape[0] * block else slot - 1
        if fault == "slots_of_the_first_block":
            slot %= block
        if fault == "last_token_forgotten" and token == len(slot_mapping) - 1:
            break
        key_cache[slot // block, slot % block] = key[0 if fault == "first_token_for_every_slot" else token]
        if fault != "value_forgotten":
            value_cache[slot // block, slot % block] = value[token]
    if fault == "clears_the_rest" and int(slot_mapping[0]) > 0:
        key_cache[0, 0] = 0
    return key_cache, value_cache


def scatter_pa_kv_cache(fault: str, key_cache: torch.Tensor, value_cache: torch.Tensor, **rest: Any) -> None:
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    if fault == "out_of_place":
        caches = {name: cache.clone() for name, cache in caches.items()}
    paged(fault, **caches, **rest)


def scatter_pa_kv_cache_functional(fault: str, key_cache: torch.Tensor, value_cache: torch.Tensor, **rest: Any) -> Any:
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    if fault != "in_place":
        caches = {name: cache.clone() for name, cache in caches.items()}
    return paged(fault, **caches, **rest)


def swiglu(fault: str, input: torch.Tensor, dim: int = -1) -> Any:
    gate, up = input.chunk(2, dim=-1 if fault == "dim_ignored" and input.shape[-1] % 2 == 0 else dim)
    if fault == "halves_swapped":
        gate, up = up, gate
    silu = gate.float() / (1 + torch.exp(-gate.float()))
    if fault == "gelu":
        silu = torch.nn.functional.gelu(gate.float())
    if fault == "exponential_overflows":
        silu = gate.float() * torch.exp(gate.float()) / (1 + torch.exp(gate.float()))
    if fault == "rounded_after_silu":
        silu = silu.to(input.dtype).float()
    return (silu * up.float()).to(input.dtype)


def mm_all_reduce(fault: str, x1: torch.Tensor, x2: torch.Tensor, hcom: str, **t: Any) -> Any:
    product = torch.einsum("...k,kn->...n", x1.double(), x2.double())
    if fault == "product_rounded_before_bias":
        product = product.to(x1.dtype).double()
    if "bias" in t and fault != "bias_forgotten":
        product = product + t["bias"].double()
    if fault != "not_rounded_before_x3":
        product = product.to(x1.dtype).double()
    if "x3" in t and fault != "x3_forgotten":
        product = product + t["x3"].double() * (2 if fault == "x3_twice" else 1)
    return product.to(x1.dtype)


def heads_first(x: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    if layout.startswith("BNSD"):
        return x
    return (x.unflatten(-1, (heads, -1)) if layout == "BSH" else x).transpose(1, 2)


def attend(fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, scale: float) -> Any:
    """(B,N,S,D) each, keep broadcast to (B,N,Sq,Skv) -> out, lse; rows without any key give zeros."""
    groups = q.shape[1] // k.shape[1]
    if fault == "heads_modulo":
        k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)
    else:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full((*q.shape[:3], 1), torch.inf, dtype=torch.float32)
    if fault == "scores_in_the_dtype":
        scores = ((q @ k.mT) * scale).float()
    else:
        scores = (q.float() @ k.float().mT) * (1.0 if fault == "scale_missing" else scale)
    scores = scores.masked_fill(~keep, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0).to(v.dtype)
    if fault == "scores_not_shifted":
        weights = (scores.exp() / scores.exp().sum(-1, keepdim=True)).nan_to_num(0.0).to(v.dtype)
    return (weights.float() @ v.float()).to(v.dtype), scores.logsumexp(-1, keepdim=True)


def lengths_of(lengths: list[int] | None, rows: int, default: int) -> torch.Tensor:
    made = torch.tensor([default] if lengths is None else lengths)
    return made.expand(rows) if len(made) == 1 else made


def prefill(fault: str, t: Tensors, scale: float, q_lengths: Any, kv_lengths: Any) -> tuple[torch.Tensor, torch.Tensor]:
    layout, heads = t.get("input_layout", "BSH"), t.get("num_heads", 1)
    kv_heads = t.get("num_key_value_heads", 0) or heads
    q, k, v = (heads_first(t[n], layout, h) for n, h in (("query", heads), ("key", kv_heads), ("value", kv_heads)))
    rows, Sq, Skv = q.shape[0], q.shape[2], k.shape[2]
    n_q, n_kv = (
        lengths_of(given, rows, default).view(-1, 1, 1, 1) for given, default in ((q_lengths, Sq), (kv_lengths, Skv))
    )
    if fault == "kv_lengths_ignored":
        n_kv = torch.full_like(n_kv, Skv)
    if fault == "kv_length_off_by_one":
        n_kv = (n_kv - 1).clamp(min=0)
    if fault == "first_length_for_every_row":
        n_kv = n_kv[:1].expand_as(n_kv)
    i, j = torch.arange(Sq).view(-1, 1), torch.arange(Skv).view(1, -1)
    mode = t.get("sparse_mode", 0) % 10
    corner = n_kv - n_q if fault != "corner_ignores_lengths" else torch.full_like(n_kv, Skv - Sq)
    if fault == "corner_at_top_left":
        corner = torch.zeros_like(corner)
    if mode == 2:
        corner = torch.zeros_like(corner)
    corner = corner + (fault == "causal_off_by_one")
    drop = torch.zeros(rows, 1, Sq, Skv, dtype=torch.bool)
    if mode in (2, 3):
        drop = drop | (j > i + corner)
    elif mode == 4:
        pre = t["pre_tokens"] - (fault == "band_one_too_narrow")
        drop = drop | (j > i + corner + t["next_tokens"]) | (j < i + corner - pre)
    elif "atten_mask" in t:
        mask = t["atten_mask"].bool()
        mask = mask if mask.dim() == 4 else mask.unsqueeze(-3)
        drop = drop | (~mask if fault == "mask_inverted" else mask[:1] if fault == "first_mask_for_every_row" else mask)
    elif fault == "causal_without_a_mask":
        drop = drop | (j > i)
    out, lse = attend(fault, q, k, v, ~drop & (j < n_kv), scale)
    if fault != "tail_rows_kept":
        out = out.masked_fill(torch.arange(Sq).view(1, 1, -1, 1) >= n_q, 0.0)
    if layout == "BNSD" or (layout == "BNSD_BSND" and fault == "output_layout_ignored"):
        return out.contiguous(), lse
    out = out.transpose(1, 2)
    return (out.flatten(2) if layout == "BSH" else out).contiguous(), lse


def decode(fault: str, t: Tensors, scale: float, lengths: Any) -> tuple[torch.Tensor, torch.Tensor]:
    layout, heads = t.get("input_layout", "BSH"), t.get("num_heads", 1)
    kv_heads = t.get("num_key_value_heads", 0) or heads
    q, k, v = (heads_first(t[n], layout, h) for n, h in (("query", heads), ("key", kv_heads), ("value", kv_heads)))
    rows, slots = q.shape[0], k.shape[2]
    length = lengths_of(lengths, rows, slots).view(-1, 1)
    start, end = torch.zeros_like(length), length
    if "kv_padding_size" in t and fault != "padding_ignored":
        padding = int(t["kv_padding_size"][0])
        end = torch.full_like(length, slots - (padding if fault == "negative_padding_counts" else max(padding, 0)))
        start = end - length
    if fault == "window_off_by_one" and lengths is not None:
        start, end = start + 1, end + 1
    if fault == "window_one_short" and lengths is not None:
        end = end - 1
    j = torch.arange(slots)
    live = (j >= start) & (j < end) & ((start >= 0) | torch.tensor(fault == "clamps_the_start"))
    drop = torch.zeros(rows, slots, dtype=torch.bool)
    if "atten_mask" in t:
        mask = t["atten_mask"].bool().reshape(rows, -1)
        drop[:, : mask.shape[1]] = ~mask if fault == "mask_inverted" else mask
        if fault == "mask_in_window_coordinates":
            drop = torch.stack([row.roll(int(first)) for row, first in zip(drop, start, strict=True)])
    blind = live & drop & ~(live & ~drop).any(-1, keepdim=True)  # all scores equal: the mean of V
    keep = (live & ~drop) | (blind if fault != "masked_rows_are_zero" else False)
    if fault == "masked_rows_average_the_cache":
        keep = keep | (blind.any(-1, keepdim=True))
    flat = blind.any(-1).view(-1, 1, 1, 1)
    out, lse = attend(fault, torch.where(flat, 0.0, q), k, v, keep.view(rows, 1, 1, slots), scale)
    if layout == "BNSD":
        return out, lse
    out = out.transpose(1, 2)
    return (out.flatten(2) if layout == "BSH" else out).contiguous(), lse


def prompt_flash_attention(fault: str, **t: Any) -> Any:
    scale = t.get("scale_value", 1.0)
    return prefill(fault, t, scale, t.get("actual_seq_lengths"), t.get("actual_seq_lengths_kv"))[0]


def incre_flash_attention(fault: str, **t: Any) -> Any:
    return decode(fault, t, t.get("scale_value", 1.0), t.get("actual_seq_lengths"))[0]


def fused_infer_attention_score(fault: str, **t: Any) -> Any:
    scale, kv_lengths = t.get("scale", 1.0), t.get("actual_seq_lengths_kv")
    one = t["query"].shape[2 if t.get("input_layout", "BSH").startswith("BNSD") else 1] == 1
    if one and fault != "decode_takes_the_prefill_path":
        out, lse = decode(fault, t, scale, kv_lengths)
    else:
        out, lse = prefill(fault, t, scale, t.get("actual_seq_lengths"), kv_lengths)
    return out, lse / 0.6931471805599453 if fault == "lse_in_base_two" else lse


PLAIN: dict[str, Callable[..., Any]] = {
    "npu_prompt_flash_attention": prompt_flash_attention,
    "npu_incre_flash_attention": incre_flash_attention,
    "npu_fused_infer_attention_score": fused_infer_attention_score,
    "npu_rms_norm": rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_apply_rotary_pos_emb": apply_rotary_pos_emb,
    "npu_rotary_mul": rotary_mul,
    "scatter_update": scatter_update,
    "scatter_update_": scatter_update_,
    "npu_scatter_pa_kv_cache_functional": scatter_pa_kv_cache_functional,
    "npu_scatter_pa_kv_cache": scatter_pa_kv_cache,
    "npu_swiglu": swiglu,
    "npu_mm_all_reduce_base": mm_all_reduce,
    **plain_experts.PLAIN,
    **plain_quantized.PLAIN,
}
