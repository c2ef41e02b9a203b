"""npu_fusion_attention, its versions and gradients: attention of training, and F.scaled_dot_product_attention.

Computed in fp32 and rounded once. What the device skips because a band says so is masked here; a row that sees no key
is 0, as the device has it with ``inner_precise=2`` and where it recognises such rows itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from qwen2_npu.emulator.eager.gradients import gradients
from qwen2_npu.emulator.eager.operators.dropout import Draw, drawing, keep_mask

Tensor = torch.Tensor

BLOCK_ROWS = 256
"""Query rows computed at once: scores take rows × keys × heads floats."""

STATISTICS = 8
"""Copies of each row's maximum and sum that the operator hands out."""

EVERYTHING = 2147483647


@dataclass(frozen=True)
class FusionOptions:
    """The operator's attributes. ``mode`` is sparse_mode, ``before`` and ``after`` are pre_ and next_tokens."""

    name: str
    heads: int
    layout: str
    scale: float = 1.0
    keep: float = 1.0
    before: int = EVERYTHING
    after: int = EVERYTHING
    mode: int = 0
    prefix: Sequence[int] | None = None
    q_ends: Sequence[int] | None = None
    kv_ends: Sequence[int] | None = None
    add_first: bool = True
    softmax_layout: str = ""


@dataclass(frozen=True)
class FusionInputs:
    """What gradients are taken by. ``q`` (B, N, Sq, D), ``k`` and ``v`` (B, Nkv, Skv, D) once laid out."""

    q: Tensor
    k: Tensor
    v: Tensor
    pse: Tensor | None = None
    sink: Tensor | None = None


def to_bnsd(x: Tensor, layout: str, heads: int) -> Tensor:
    """(B, N, S, D) of a tensor in ``layout``."""
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(1, 2)
    if layout == "BSH":
        return x.unflatten(2, (heads, -1)).transpose(1, 2)
    if layout == "SBH":
        return x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
    raise ValueError(f"npu_fusion_attention: input_layout={layout!r}; one of BSH, SBH, BSND, BNSD, TND is known")


def from_bnsd(x: Tensor, layout: str) -> Tensor:
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(1, 2)
    return x.transpose(1, 2).flatten(2) if layout == "BSH" else x.permute(2, 0, 1, 3).flatten(2)


def kv_heads(q: Tensor, x: Tensor, layout: str, heads: int) -> int:
    if layout in ("BSH", "SBH"):
        return int(x.shape[2] * heads // q.shape[2]) if x.shape[2] else heads
    return int(x.shape[1] if layout == "BNSD" else x.shape[2])


def hidden(
    mask: Tensor | None, options: FusionOptions, rows: range, keys: int, queries: int, batch: int
) -> Tensor | None:
    """bool, broadcastable to (1, 1, rows, keys): True where a key is dropped. None: nothing is.

    Args:
        mask: as given, True drops; (Sq, Skv), (B|1, 1|N, Sq, Skv), or a compressed triangle.
        rows: query rows of this block. keys, queries: Skv and Sq. batch: row of the batch, for ``prefix``.
    """
    if mask is None:
        return None
    mode, start, stop = options.mode, rows.start, rows.stop
    column, row = torch.arange(keys), torch.arange(start, stop).unsqueeze(-1)
    from_end = keys - queries
    if mode in (2, 3, 6):
        drop = column > row + (from_end if mode != 2 else 0)
        if mode == 6:
            if options.prefix is None:
                raise ValueError(f"{options.name}: sparse_mode=6 needs prefix")
            drop = drop & (column >= options.prefix[batch])
        return drop
    if mode in (4, 7, 8):
        return (column > row + from_end + options.after) | (column < row + from_end - options.before)
    if mode not in (0, 1, 5):
        raise ValueError(f"{options.name}: sparse_mode={mode} is not one of 0 to 8")
    given = mask.bool()[..., start:stop, :keys]
    if mode == 0 and (options.before < queries or options.after < keys):
        given = given | (column > row + options.after) | (column < row - options.before)
    return given


def attend(
    inputs: FusionInputs, options: FusionOptions, mask: Tensor | None, keep: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one row of the batch.

    Args:
        inputs: q (N, Sq, D), k and v (Nkv, Skv, D), pse broadcastable to (N, Sq, Skv), sink (N,).
        mask: of this row. keep: bool (N, Sq, Skv), False where dropout drops.

    Returns:
        out (N, Sq, Dv) fp32, and each score row's maximum and sum (N, Sq).
    """
    q, k, v = inputs.q.float(), inputs.k.float(), inputs.v.float()
    heads, queries, _ = q.shape
    groups, keys, width = v.shape
    grouped = q.unflatten(0, (groups, heads // groups))
    outs, maxima, sums = [], [], []
    for start in range(0, queries, BLOCK_ROWS):
        rows = range(start, min(start + BLOCK_ROWS, queries))
        block = slice(rows.start, rows.stop)
        scores = (grouped[:, :, block] @ k.transpose(-1, -2).unsqueeze(1)).flatten(0, 1)
        if inputs.pse is not None:
            pse = inputs.pse.float()
            pse = pse[..., block, :] if pse.shape[-2] == queries else pse
            scores = options.scale * (scores + pse) if options.add_first else options.scale * scores + pse
        else:
            scores = scores * options.scale
        drop = hidden(mask, options, rows, keys, queries, batch)
        if drop is not None:
            scores = scores.masked_fill(drop, float("-inf"))
        maximum = scores.amax(-1, keepdim=True) if keys else scores.new_full((*scores.shape[:-1], 1), float("-inf"))
        if inputs.sink is not None:
            maximum = torch.maximum(maximum, inputs.sink.float().view(-1, 1, 1))
        maximum = maximum.detach()
        shift = torch.where(maximum.isinf(), 0.0, maximum)
        weights = (scores - shift).exp()
        total = weights.sum(-1, keepdim=True)
        if inputs.sink is not None:
            total = total + (inputs.sink.float().view(-1, 1, 1) - shift).exp()
        weights = weights / torch.where(total == 0, 1.0, total)
        if keep is not None:
            weights = torch.where(keep[:, block], weights / options.keep, 0.0)
        outs.append((weights.unflatten(0, (groups, heads // groups)) @ v.unsqueeze(1)).flatten(0, 1))
        maxima.append(maximum.squeeze(-1))
        sums.append(total.squeeze(-1))
    if not outs:
        return q.new_zeros(heads, 0, width), q.new_zeros(heads, 0), q.new_zeros(heads, 0)
    return torch.cat(outs, 1), torch.cat(maxima, 1), torch.cat(sums, 1)


def _of_row(value: Tensor | None, batch: int) -> Tensor | None:
    """Row ``batch`` of a (B|1, …, Sq, Skv) tensor, or all of a (Sq, Skv) one."""
    if value is None or value.dim() == 2:
        return value
    return value[batch if value.shape[0] > 1 else 0]


def _copies(statistic: Tensor) -> Tensor:
    """(…, 8) of a value per row, as the operator hands it out."""
    return statistic.unsqueeze(-1).expand(*statistic.shape, STATISTICS).contiguous()


def dense(
    inputs: FusionInputs, options: FusionOptions, mask: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All layouts with a batch dimension: out in the layout, maximum and sum (B, N, Sq, 8)."""
    layout, heads = options.layout, options.heads
    q = to_bnsd(inputs.q, layout, heads)
    k, v = (to_bnsd(x, layout, kv_heads(inputs.q, inputs.k, layout, heads)) for x in (inputs.k, inputs.v))
    found = [
        attend(
            FusionInputs(q[row], k[row], v[row], _of_row(inputs.pse, row), inputs.sink),
            options,
            _of_row(mask, row),
            None if keep is None else keep[row],
            row,
        )
        for row in range(q.shape[0])
    ]
    out, maximum, total = (torch.stack(part) for part in zip(*found, strict=True))
    return from_bnsd(out.to(inputs.q.dtype), layout).contiguous(), _copies(maximum), _copies(total)


def packed(
    inputs: FusionInputs, options: FusionOptions, mask: Tensor | None, keep: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Layout TND: sequences one after another, ending at ``q_ends`` and ``kv_ends``; maximum and sum (T, N, 8)."""
    if options.q_ends is None or options.kv_ends is None:
        raise ValueError(f"{options.name}: input_layout='TND' needs actual_seq_qlen and actual_seq_kvlen")
    out = inputs.q.new_zeros(*inputs.q.shape[:2], inputs.v.shape[-1], dtype=torch.float32)
    maximum = out.new_zeros(*inputs.q.shape[:2])
    total = maximum.clone()
    last = sum(1 for end in options.q_ends if end) - 1
    pieces, places = [], []
    spans = zip(pairwise([0, *options.q_ends]), pairwise([0, *options.kv_ends]), strict=True)
    for row, ((q0, q1), (k0, k1)) in enumerate(spans):
        if q1 <= q0:
            continue
        outer = {7: row == last, 8: row == 0}.get(options.mode)
        local = options if outer in (None, True) else replace(options, mode={7: 3, 8: 2}[options.mode])
        q, k, v = (x[a:b].transpose(0, 1) for x, a, b in ((inputs.q, q0, q1), (inputs.k, k0, k1), (inputs.v, k0, k1)))
        pse = None if inputs.pse is None else _of_row(inputs.pse, row)
        if pse is not None:
            pse = pse[..., : q1 - q0, : k1 - k0]
        piece = attend(FusionInputs(q, k, v, pse, inputs.sink), local, mask, None if keep is None else keep[row], row)
        pieces.append([part.transpose(0, 1) for part in piece])
        places.append(torch.arange(q0, q1))
    if pieces:
        index = torch.cat(places)
        out, maximum, total = (
            whole.index_copy(0, index, torch.cat(parts))
            for whole, parts in zip((out, maximum, total), zip(*pieces, strict=True), strict=True)
        )
    return out.to(inputs.q.dtype), _copies(maximum), _copies(total)


def compute(
    inputs: FusionInputs, options: FusionOptions, mask: Tensor | None, seed: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, maximum and sum; dropout comes from ``seed`` alone, so that the gradient finds the same."""
    generator = None if seed is None or options.keep >= 1 else torch.Generator("cpu").manual_seed(seed)
    if options.layout == "TND":
        keep = None
        if generator is not None and options.q_ends is not None and options.kv_ends is not None:
            sizes = zip(pairwise([0, *options.q_ends]), pairwise([0, *options.kv_ends]), strict=True)
            keep = [
                keep_mask((options.heads, max(q1 - q0, 0), max(k1 - k0, 0)), options.keep, generator)
                for (q0, q1), (k0, k1) in sizes
            ]
        return packed(inputs, options, mask, keep)
    whole = None
    if generator is not None:
        shape = to_bnsd(inputs.q, options.layout, options.heads).shape[:3]
        keys = to_bnsd(inputs.k, options.layout, kv_heads(inputs.q, inputs.k, options.layout, options.heads)).shape[2]
        whole = keep_mask((*shape, keys), options.keep, generator)
    return dense(inputs, options, mask, whole)


def _ends(value: Any) -> Sequence[int] | None:
    return value.tolist() if isinstance(value, Tensor) else value


def _options(name: str, heads: int, layout: str, given: dict[str, Any]) -> FusionOptions:
    """Attributes under any version's names; those that are not emulated are refused."""
    refused = [
        key for key in ("padding_mask", "dropout_mask", "q_start_idx", "kv_start_idx") if given.get(key) is not None
    ]
    pse_type = given.get("pse_type", 1)
    if pse_type not in (0, 1):
        refused.append(f"pse_type={pse_type}")
    if refused:
        raise NotImplementedError(f"{name}: {', '.join(refused)} is not emulated")
    return FusionOptions(
        name=name,
        heads=heads,
        layout=layout,
        scale=given.get("scale", given.get("scale_value", 1.0)),
        keep=given.get("keep_prob", 1.0),
        before=given.get("pre_tockens", given.get("pre_tokens", EVERYTHING)),
        after=given.get("next_tockens", given.get("next_tokens", EVERYTHING)),
        mode=given.get("sparse_mode", 0),
        prefix=_ends(given.get("prefix")),
        q_ends=_ends(given.get("actual_seq_qlen")),
        kv_ends=_ends(given.get("actual_seq_kvlen")),
        add_first=pse_type == 1,
        softmax_layout=given.get("softmax_layout", ""),
    )


_NAMES = """
    pse padding_mask atten_mask scale keep_prob pre_tockens next_tockens inner_precise prefix actual_seq_qlen
    actual_seq_kvlen sparse_mode gen_mask_parallel sync softmax_layout sink dropout_mask seed offset
"""
POSITIONAL = _NAMES.split()
"""Of versions 1 and 3, after query, key, value, head_num and input_layout."""


def _forward(name: str) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_num: int,
        input_layout: str,
        *more: Any,
        generator: Draw,
        **named: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        given = {**dict(zip(POSITIONAL, more, strict=False)), **named}
        options = _options(name, head_num, input_layout, given)
        query, key = _with_rope(query, given.get("query_rope")), _with_rope(key, given.get("key_rope"))
        seed = generator().initial_seed() & 0x7FFFFFFF if options.keep < 1 else 0
        inputs = FusionInputs(query, key, value, given.get("pse"), given.get("sink"))
        out, maximum, total = compute(inputs, options, given.get("atten_mask"), seed)
        return out, maximum, total, query.new_empty(0), seed

    return forward


def _with_rope(x: Tensor, rope: Tensor | None) -> Tensor:
    """The head dimension with that of ``rope`` after it (layout BSND, BNSD or TND)."""
    return x if rope is None else torch.cat([x, rope], -1)


def _with_numbers(name: str) -> Callable[..., Any]:
    forward = _forward(name)

    @drawing
    def run(*args: Any, **kwargs: Any) -> Any:
        *tensors, seed = forward(*args, **kwargs)
        return (*tensors, seed, 0, 0)

    return run


@drawing
def attention_v3(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Version 3 hands seed and offset out as tensors."""
    *tensors, seed = _forward("npu_fusion_attention_v3")(*args, **kwargs)
    return (*tensors, torch.tensor([seed]), torch.tensor([0]))


def _backward(name: str, given: dict[str, Any], heads: int, layout: str, grad: Tensor, x: Sequence[Tensor]) -> Any:
    """Gradients by q, k, v, pse, sink, query_rope, key_rope."""
    options = _options(name, heads, layout, given)
    seed = given.get("seed")
    seed = int(seed) if seed is not None else 0
    mask = given.get("atten_mask")

    def forward(
        q: Tensor, k: Tensor, v: Tensor, pse: Tensor | None, sink: Tensor | None, q_rope: Tensor, k_rope: Tensor
    ) -> Tensor:
        return compute(FusionInputs(_with_rope(q, q_rope), _with_rope(k, k_rope), v, pse, sink), options, mask, seed)[0]

    inputs = (*x, given.get("pse"), given.get("sink"), given.get("query_rope"), given.get("key_rope"))
    return gradients(forward, inputs, grad)


def attention_grad(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """Versions 1 and 3: gradients by query, key, value, pse, sink."""

    def backward(query: Tensor, key: Tensor, value: Tensor, dy: Tensor, heads: int, layout: str, **given: Any) -> Any:
        dq, dk, dv, dpse, dsink, _, _ = _backward(name, given, heads, layout, dy, (query, key, value))
        empty = query.new_empty(0)
        return dq, dk, dv, empty if dpse is None else dpse, empty.float() if dsink is None else dsink

    return backward


def attention_grad_v2(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, heads: int, layout: str, **given: Any
) -> tuple[Tensor | None, ...]:
    """Gradients by query, key, value, pse, query_rope, key_rope, sink."""
    found = _backward("npu_fusion_attention_grad_v2", given, heads, layout, dy, (query, key, value))
    dq, dk, dv, dpse, dsink, dq_rope, dk_rope = (query.new_empty(0) if item is None else item for item in found)
    return dq, dk, dv, dpse, dq_rope, dk_rope, dsink


TABLE: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention": _with_numbers("npu_fusion_attention"),
    "npu_fusion_attention_v2": _with_numbers("npu_fusion_attention_v2"),
    "npu_fusion_attention_v3": attention_v3,
    "npu_fusion_attention_grad": attention_grad("npu_fusion_attention_grad"),
    "npu_fusion_attention_grad_v2": attention_grad_v2,
    "npu_fusion_attention_grad_v3": attention_grad("npu_fusion_attention_grad_v3"),
}
