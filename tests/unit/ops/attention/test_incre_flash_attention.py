"""npu_incre_flash_attention: windows, masks in cache coordinates, cost, one graph for all lengths."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.ops.attention import decode, incre_flash_attention
from tests.unit.ops.attention.reference import (
    HEADS,
    NKV,
    NQ,
    D,
    assert_near,
    attention,
    random_qkv,
    to_layout,
)
from tests.unit.ops.support import Recorder, compiled

CACHE = 32


def ifa(q: Tensor, k: Tensor, v: Tensor, layout: str = "BSND", **arguments: Any) -> Tensor:
    q, k, v = (to_layout(tensor, layout) for tensor in (q, k, v))
    # Literals: a global float would be a symbol under torch.compile, and cost a restart of the compilation.
    defaults = {"num_heads": 4, "num_key_value_heads": 2, "scale_value": 0.3, "input_layout": layout}
    return torch.ops.npu.npu_incre_flash_attention(q, k, v, **(defaults | arguments))


def window(lengths: list[int] | None, padding: int | None) -> Tensor:
    """bool (B|1, 1, 1, S): the slots each row owns."""
    slots, live = torch.arange(CACHE), torch.tensor(lengths or [CACHE]).view(-1, 1, 1, 1)
    if padding is None:
        return slots < live
    end = CACHE - max(padding, 0)
    return (slots < end) & (slots >= end - live) & (live <= end)


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [None, [7], [5, 9, 32], [9, 9, 9], [9, 5, 9], [0, 3, 1], [0]])
def test_lengths_are_live_cache_slots(layout: str, dtype: torch.dtype, lengths: list[int] | None) -> None:
    q, k, v = random_qkv(3, 1, CACHE, dtype)
    keep = window(lengths, None).expand(3, 1, 1, CACHE)
    want = to_layout(attention(q, k, v, keep), layout)
    # What lies outside the window is never read.
    dead = ~keep.transpose(-1, -2)
    ours = ifa(q, k.masked_fill(dead, torch.nan), v.masked_fill(dead, torch.nan), layout, actual_seq_lengths=lengths)
    assert_near(ours, want)


@pytest.mark.parametrize("padding", [0, 5, -3, 23, 32, 40])
@pytest.mark.parametrize("lengths", [[7], [5, 9, 27], [9, 9, 9], [0, 3, 30]])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("readable", [True, False], ids=["", "known to the device alone"])
def test_kv_padding_right_aligns_the_window(
    padding: int, lengths: list[int], shape: tuple[int, ...], readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "is_readable", lambda tensor: readable)
    q, k, v = random_qkv(3, 1, CACHE)
    keep = window(lengths, padding).expand(3, 1, 1, CACHE)
    want = to_layout(attention(q, k, v, keep), "BSND")
    dead = ~keep.transpose(-1, -2)
    k, v = k.masked_fill(dead, torch.nan), v.masked_fill(dead, torch.nan)
    ours = ifa(q, k, v, actual_seq_lengths=lengths, kv_padding_size=torch.full(shape, padding))
    assert_near(ours, want)


@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("lengths", [[28], [5, 9, 28]])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int8, torch.uint8])
@pytest.mark.parametrize("readable", [True, False], ids=["", "known to the device alone"])
def test_masks_use_cache_coordinates(
    padding: int | None,
    lengths: list[int],
    rank: int,
    mask_dtype: torch.dtype,
    readable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "is_readable", lambda tensor: readable)
    q, k, v = random_qkv(3, 1, CACHE)
    drop = torch.rand(3, CACHE, generator=torch.Generator().manual_seed(1)) > 0.6
    drop[0, 1:] = False  # row 0 keeps something in every window
    mask = drop.view(3, *[1] * (rank - 2), CACHE).to(mask_dtype)
    kv_padding = None if padding is None else torch.tensor([padding])
    ours = ifa(q, k, v, atten_mask=mask, actual_seq_lengths=lengths, kv_padding_size=kv_padding)
    inside = window(lengths, padding).expand(3, 1, 1, CACHE)
    keep = inside & ~drop.view(3, 1, 1, CACHE)
    assert keep.any(-1).all()
    assert_near(ours, to_layout(attention(q, k, v, keep), "BSND"))


@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("lengths", [[9], [5, 9, 0]])
def test_a_fully_masked_row_is_the_mean_of_its_window(padding: int | None, lengths: list[int]) -> None:
    q, k, v = random_qkv(3, 1, CACHE)
    ours = ifa(
        q,
        k,
        v,
        atten_mask=torch.ones(3, CACHE, dtype=torch.bool),
        actual_seq_lengths=lengths,
        kv_padding_size=None if padding is None else torch.tensor([padding]),
    )
    keep = window(lengths, padding).expand(3, 1, 1, CACHE)
    assert_near(ours, to_layout(attention(torch.zeros_like(q), k, v, keep), "BSND"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 1), (14, 2)])
def test_query_heads_map_by_division(heads: int, kv_heads: int) -> None:
    q = torch.randn(2, heads, 1, D)
    k, v = torch.randn(2, 2, kv_heads, CACHE, D)
    ours = ifa(q, k, v, num_heads=heads, num_key_value_heads=0 if heads == kv_heads else kv_heads)
    assert_near(ours, to_layout(attention(q, k, v, torch.ones(CACHE, dtype=torch.bool)), "BSND"))


@pytest.mark.parametrize("lengths", [[128], [128, 100, 3, 17]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_but_views_touches_more_than_the_live_window(
    lengths: list[int], masked: bool, padded: bool, dtype: torch.dtype
) -> None:
    cache = 4096
    q, k, v = random_qkv(4, 1, cache, dtype)
    arguments: dict[str, Any] = {"actual_seq_lengths": lengths}
    if masked:
        arguments["atten_mask"] = torch.zeros(4, cache, dtype=torch.bool)
    if padded:
        arguments["kv_padding_size"] = torch.tensor([64])
    q, k, v = (to_layout(tensor, "BSND") for tensor in (q, k, v))
    with Recorder() as recorder:
        torch.ops.npu.npu_incre_flash_attention(q, k, v, input_layout="BSND", **HEADS, **arguments)
    assert recorder.largest_read == 4 * NKV * 128 * D
    assert len(recorder.named("scaled_dot_product")) == 1


def every_length() -> Iterator[Any]:
    """Every case once by default, two that have every value between them by inductor, which takes longer; the night
    runs all by inductor."""
    for padded, shared, context in product([False, True], [False, True], [torch.no_grad, torch.inference_mode]):
        fully = padded != shared and padded == (context is torch.inference_mode)
        yield pytest.param(padded, shared, context, "inductor", marks=() if fully else pytest.mark.slow)
        if not fully:
            yield padded, shared, context, "aot_eager"


@pytest.mark.parametrize(("padded", "shared", "context", "backend"), list(every_length()))
def test_one_graph_serves_every_length(padded: bool, shared: bool, context: Any, backend: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], padding: Tensor | None) -> Tensor:
        return ifa(q, k, v, actual_seq_lengths=lengths, kv_padding_size=padding)

    fast, counter = compiled(function, backend)
    with context():
        for step in range(10):
            q, k, v = random_qkv(3, 1, CACHE)
            lengths = [4 + step] if shared else [12 + step, 3 + step, 2 + 2 * step]
            padding = 10 - step if padded else None
            keep = window(lengths, padding).expand(3, 1, 1, CACHE)
            ours = fast(q, k, v, lengths, None if padding is None else torch.tensor([padding]))
            assert_near(ours, to_layout(attention(q, k, v, keep), "BSND"))
    assert counter.frame_count == 1


@pytest.mark.parametrize("lengths", [None, [5], [5, 0, 9]])
@pytest.mark.parametrize("padded", [False, True])
def test_fake_and_meta_tensors(lengths: list[int] | None, padded: bool) -> None:
    padded = padded and lengths is not None
    with FakeTensorMode():
        q, cache = torch.zeros(3, 1, NQ * D), torch.zeros(3, CACHE, NKV * D)
        padding = torch.zeros(1, dtype=torch.int64) if padded else None
        out = torch.ops.npu.npu_incre_flash_attention(
            q, cache, cache, actual_seq_lengths=lengths, kv_padding_size=padding, **HEADS
        )
    assert out.shape == (3, 1, NQ * D)
    q, cache = torch.zeros(3, 1, NQ * D, device="meta"), torch.zeros(3, CACHE, NKV * D, device="meta")
    padding = torch.zeros(1, dtype=torch.int64, device="meta") if padded else None
    out = torch.ops.npu.npu_incre_flash_attention(
        q, cache, cache, actual_seq_lengths=lengths, kv_padding_size=padding, **HEADS
    )
    assert out.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"query": torch.zeros(2, count, NQ, D)}, r"query is .* one query per row .* npu_prompt_flash_attention")
            for count in (0, 2)
        ),
        ({"input_layout": "BNSD_BSND"}, "input_layout is 'BNSD_BSND'; supported: BSH, BSND, BNSD"),
        ({"actual_seq_lengths": [33]}, r"actual_seq_lengths is \[33\]; supported: lengths from 0 to 32"),
        ({"actual_seq_lengths": [1, 2, 3]}, "actual_seq_lengths is .* 1 or 2 entries"),
        ({"kv_padding_size": torch.tensor([1])}, "kv_padding_size is .* together with actual_seq_lengths"),
        (
            {"kv_padding_size": torch.tensor([1.0]), "actual_seq_lengths": [3]},
            "kv_padding_size is .* an int64 tensor",
        ),
        (
            {"kv_padding_size": torch.zeros(0, dtype=torch.int64), "actual_seq_lengths": [3]},
            "kv_padding_size is .* an int64 tensor with one element",
        ),
        ({"atten_mask": torch.zeros(2, CACHE)}, "atten_mask is .* dtype bool, int8 or uint8"),
        ({"atten_mask": torch.zeros(1, CACHE).bool()}, r"atten_mask is .* with B=2"),
        *(
            ({"atten_mask": torch.zeros(2, *ones, CACHE).bool()}, r"atten_mask is .* \(B, S\), \(B, 1, S\)")
            for ones in ((2,), (0,), (1, 2), (2, 1), (1, 1, 1))
        ),
        (
            {"atten_mask": torch.zeros(2, 8).bool(), "actual_seq_lengths": [9]},
            "atten_mask is .* at least 9, the live cache slots",
        ),
        (
            dict.fromkeys(("key", "value"), torch.zeros(1).expand(2, incre_flash_attention.MAX_CACHE + 1, NKV, D)),
            f"key is .* at most {incre_flash_attention.MAX_CACHE} cache slots",
        ),
        ({"inner_precise": 2}, "inner_precise is 2; supported: 0 or 1"),
        ({"block_table": torch.zeros(1)}, "block_table is"),
        ({"block_size": 128}, "block_size is 128; supported: only the default 0"),
        ({"antiquant_scale": torch.zeros(1)}, "antiquant_scale is"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    q, k, v = (to_layout(tensor, "BSND") for tensor in random_qkv(2, 1, CACHE))
    arguments = HEADS | {"query": q, "key": k, "value": v, "input_layout": "BSND"}
    with pytest.raises(ValueError, match=f"npu::npu_incre_flash_attention: {message}"):
        torch.ops.npu.npu_incre_flash_attention(**(arguments | change))
