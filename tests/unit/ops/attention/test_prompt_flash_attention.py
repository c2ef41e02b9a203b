"""npu_prompt_flash_attention: layouts, masks, sparse modes, lengths, blocks, tracing."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.ops.attention.reference import (
    CAUSAL,
    HEADS,
    NQ,
    D,
    assert_near,
    attention,
    random_qkv,
    to_layout,
)
from tests.unit.ops.support import Recorder, compiled

SIZES = [(5, 5), (9, 3), (300, 300), (3, 700), (600, 520)]
FAR = 2147483647


def pfa(q: Tensor, k: Tensor, v: Tensor, layout: str = "BNSD", **arguments: Any) -> Tensor:
    q, k, v = (to_layout(tensor, layout) for tensor in (q, k, v))
    # Literals: a global float would be a symbol under torch.compile, and cost a restart of the compilation.
    defaults = {"num_heads": 4, "num_key_value_heads": 2, "scale_value": 0.3, "input_layout": layout}
    return torch.ops.npu.npu_prompt_flash_attention(q, k, v, **(defaults | arguments))


def distance(q_len: int, kv_len: int) -> Tensor:
    """key − query, (Sq, Skv)."""
    return torch.arange(kv_len) - torch.arange(q_len)[:, None]


def random_drop(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_default_call_is_not_causal(layout: str, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, 5, 9, dtype)
    want = attention(q, k, v, torch.ones(5, 9, dtype=torch.bool))
    assert_near(pfa(q, k, v, layout), to_layout(want, layout.split("_")[-1]))


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
@pytest.mark.parametrize("from_end", [False, True])
def test_causal_modes(q_len: int, kv_len: int, from_end: bool) -> None:
    q, k, v = random_qkv(2, q_len, kv_len)
    keep = distance(q_len, kv_len) <= (kv_len - q_len if from_end else 0)
    ours = pfa(q, k, v, atten_mask=CAUSAL, sparse_mode=3 if from_end else 2, pre_tokens=1, next_tokens=5)
    assert_near(ours, attention(q, k, v, keep))


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
@pytest.mark.parametrize(("pre", "after"), [(7, 3), (FAR, 0), (100, -2), (0, 0), (-3, 20)])
def test_band_mode_counts_from_the_bottom_right(q_len: int, kv_len: int, pre: int, after: int) -> None:
    q, k, v = random_qkv(2, q_len, kv_len)
    offset = distance(q_len, kv_len) - (kv_len - q_len)
    ours = pfa(q, k, v, atten_mask=CAUSAL, sparse_mode=4, pre_tokens=pre, next_tokens=after)
    assert_near(ours, attention(q, k, v, (offset <= after) & (offset >= -pre)))


@cache
def masked(q_len: int, kv_len: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random mask (rows, 1, Sq, Skv); what is seen through it, and through it within the band (-9, 2)."""
    q, k, v = random_qkv(2, q_len, kv_len)
    drop = random_drop(rows, 1, q_len, kv_len)
    band = distance(q_len, kv_len)
    return drop, attention(q, k, v, ~drop), attention(q, k, v, ~drop & (band <= 2) & (band >= -9))


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
@pytest.mark.parametrize(("rank", "rows"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int8, torch.uint8])
def test_masks_of_every_shape(q_len: int, kv_len: int, rank: int, rows: int, mask_dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, q_len, kv_len)
    drop, seen, seen_in_band = masked(q_len, kv_len, rows)
    mask = {2: drop[0, 0], 3: drop[:, 0], 4: drop}[rank].to(mask_dtype)
    assert_near(pfa(q, k, v, atten_mask=mask, sparse_mode=1), seen)
    assert_near(pfa(q, k, v, atten_mask=mask, pre_tokens=9, next_tokens=2), seen_in_band)


@pytest.mark.parametrize("sparse_mode", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([4], None),
        ([300, 2], None),
        ([300, 2], [300, 2]),
        (None, [7, 299]),
        ([250, 3], [100, 0]),
        ([300, 250], [200, 7]),
        ([3, 250], [3, 1]),
        ([0], [5]),
        ([9], [0]),
        ([6], [9, 4]),  # one length of the queries, beyond the keys of the second row alone
        ([9, 4], [6]),
    ],
)
def test_lengths(sparse_mode: int, q_lens: list[int] | None, kv_lens: list[int] | None) -> None:
    length = 300
    q, k, v = random_qkv(2, length, length)
    live_q = torch.tensor(q_lens or [length]).view(-1, 1, 1, 1)
    live_kv = torch.tensor(kv_lens or [length]).view(-1, 1, 1, 1)
    band = distance(length, length)
    from_end = band - (live_kv - live_q)
    drop = random_drop(2, 1, length, length)
    visible = {0: band == band, 1: ~drop, 2: band <= 0, 3: from_end <= 0, 4: (from_end <= 3) & (from_end >= -20)}
    arguments: list[dict[str, Any]] = [
        {},
        {"atten_mask": drop},
        *[{"atten_mask": CAUSAL, "pre_tokens": 20, "next_tokens": 3}] * 3,
    ]
    keep = (visible[sparse_mode] & (torch.arange(length) < live_kv)).expand(2, 1, -1, -1)
    want = attention(q, k, v, keep) * (torch.arange(length)[:, None] < live_q)
    # What lies past a row's length is never read.
    dead = torch.arange(length)[:, None] >= live_kv
    k, v = k.masked_fill(dead, torch.nan), v.masked_fill(dead, torch.nan)
    ours = pfa(
        q,
        k,
        v,
        sparse_mode=sparse_mode,
        actual_seq_lengths=q_lens,
        actual_seq_lengths_kv=kv_lens,
        **arguments[sparse_mode],
    )
    assert_near(ours, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_any_key_are_zero(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, 6, 6, dtype)
    drop = CAUSAL[:6, :6].clone()
    drop[:3] = True
    ours = pfa(q, k, v, atten_mask=drop, sparse_mode=1)
    assert not ours[:, :, :3].any()
    assert_near(ours, attention(q, k, v, ~drop))


def test_bands_skip_the_keys_they_cannot_reach() -> None:
    length = 1024
    q, k, v = random_qkv(1, length, length)
    mask = CAUSAL[:length, :length]
    cases: list[tuple[dict[str, Any], float]] = [
        ({"atten_mask": mask, "next_tokens": 0}, 0.65),
        ({"atten_mask": CAUSAL, "sparse_mode": 4, "pre_tokens": 64, "next_tokens": 0}, 0.35),
    ]
    for arguments, share in cases:
        with Recorder() as recorder:
            pfa(q, k, v, **arguments)
        pairs = sum(call.shapes[0][2] * call.shapes[1][2] for call in recorder.named("scaled_dot_product"))
        assert 0 < pairs <= share * length * length
    with Recorder() as recorder:
        pfa(q, k, v, atten_mask=CAUSAL, sparse_mode=3)
    (call,) = recorder.named("scaled_dot_product")
    assert len(call.shapes) == 3  # no mask: the kernel's own causal loop


@pytest.mark.parametrize("sparse_mode", [2, 3])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_serves_every_prompt_length(sparse_mode: int, backend: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pfa(q, k, v, atten_mask=CAUSAL, sparse_mode=sparse_mode)

    fast, counter = compiled(function, backend)
    for length in (7, 40, 300):
        q, k, v = random_qkv(2, length, length)
        assert_near(fast(q, k, v), attention(q, k, v, distance(length, length) <= 0))
    assert counter.frame_count == 1


def test_compiled_with_a_mask() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return pfa(q, k, v, atten_mask=mask, next_tokens=0)

    fast, counter = compiled(function)
    for length in (7, 40, 300):
        q, k, v = random_qkv(2, length, length)
        drop = CAUSAL[:length, :length].expand(2, 1, -1, -1).clone()
        drop[1, :, :, :3] = True
        assert_near(fast(q, k, v, drop), attention(q, k, v, ~drop))
    assert counter.frame_count == 1


def test_fake_and_meta_tensors() -> None:
    arguments = HEADS | {"input_layout": "BNSD_BSND", "actual_seq_lengths": [3, 5], "sparse_mode": 3}
    with FakeTensorMode():
        q, k, v = random_like(2, 6, 8)
        mask = torch.zeros(2048, 2048, dtype=torch.bool)
        out = torch.ops.npu.npu_prompt_flash_attention(q, k, v, atten_mask=mask, **arguments)
        # Strides of fake tensors are not looked at: none of them is read.
        strided = torch.ops.npu.npu_prompt_flash_attention(
            q.transpose(2, 3).contiguous().transpose(2, 3), k, v, atten_mask=mask, **arguments
        )
    assert out.shape == strided.shape == (2, 6, NQ, D)
    q, k, v, mask = (tensor.to("meta") for tensor in (*random_qkv(2, 6, 8), CAUSAL))
    assert torch.ops.npu.npu_prompt_flash_attention(q, k, v, atten_mask=mask, **arguments).is_meta


def random_like(batch: int, q_len: int, kv_len: int) -> tuple[Tensor, ...]:
    """As random_qkv, without a generator: fake tensors take none."""
    return tuple(torch.zeros(tensor.shape) for tensor in random_qkv(batch, q_len, kv_len))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_layout": "TND"}, "input_layout is 'TND'; supported: BSH, BSND, BNSD, BNSD_BSND"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 257}, "num_heads is 257; supported: 1 to 256"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"num_heads": 8}, "query is .* num_heads=8 heads at axis 1"),
        ({"key": torch.zeros(2, 2, 9, 8)}, r"key is .* shape \(2, 2, 9, 16\)"),
        ({"value": torch.zeros(2, 2, 8, 16)}, "value is"),
        ({"value": torch.zeros(2, 2, 9, 16).half()}, "value is .* the dtype of the first input"),
        ({"query": torch.zeros(2, 4, 5, 16).double()}, "query is .* float32, bfloat16 or float16"),
        ({"query": torch.zeros(2, 5, 64)}, "query is .* 4 dimensions in layout BNSD"),
        ({"query": torch.zeros(2, 5, 4, 16).transpose(1, 2)}, r"query is .* contiguous .*call .contiguous\(\)"),
        ({"sparse_mode": 5}, "sparse_mode is 5; supported: 0, 1, 2, 3, 4"),
        ({"sparse_mode": 15}, "sparse_mode is 15"),
        ({"sparse_mode": 1}, r"atten_mask is None; supported: a mask of shape \(5, 9\)"),
        ({"sparse_mode": 3}, r"atten_mask is None; supported: a mask of shape \(2048, 2048\)"),
        ({"sparse_mode": 2, "atten_mask": CAUSAL[:5, :9]}, r"atten_mask is .* \(2048, 2048\)"),
        *(
            ({"sparse_mode": mode, "atten_mask": CAUSAL.expand(*lead, -1, -1)}, r"atten_mask is .* \(2048, 2048\)")
            for mode in (2, 3, 4)
            for lead in ((2,), (3,), (2, 1), (1, 2))
        ),
        *(
            ({"sparse_mode": 2, "atten_mask": torch.zeros(shape, dtype=torch.bool)}, r"atten_mask is .* \(2048, 2048\)")
            for shape in ((2047, 2048), (2049, 2048), (2048, 2049))
        ),
        ({"atten_mask": torch.zeros(5, 9)}, "atten_mask is .* dtype bool, int8 or uint8"),
        ({"atten_mask": CAUSAL[:9, :5]}, "atten_mask is .* B=2, Sq=5, Skv=9"),
        ({"atten_mask": CAUSAL[:5, :9].expand(3, 5, 9)}, "atten_mask is"),
        ({"atten_mask": CAUSAL[:5, :9].expand(2, 4, 5, 9)}, "atten_mask is"),
        ({"actual_seq_lengths": [1, 2, 3]}, r"actual_seq_lengths is \[1, 2, 3\]; supported: 1 or 2 entries"),
        ({"actual_seq_lengths": [1, 6]}, "actual_seq_lengths is .* from 0 to 5"),
        ({"actual_seq_lengths_kv": [-1]}, "actual_seq_lengths_kv is .* from 0 to 9"),
        ({"pse_shift": torch.zeros(1)}, "pse_shift is a torch.float32 tensor .* only the default None"),
        ({"padding_mask": torch.zeros(1)}, "padding_mask is"),
        ({"quant_scale2": torch.zeros(1)}, "quant_scale2 is"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    q, k, v = random_qkv(2, 5, 9)
    arguments = HEADS | {"query": q, "key": k, "value": v, "input_layout": "BNSD"}
    with pytest.raises(ValueError, match=f"npu::npu_prompt_flash_attention: {message}"):
        torch.ops.npu.npu_prompt_flash_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("shape", "heads", "kv_heads", "message"),
    [
        ((1, 1, 2, 513), 2, 2, "a head size of 1 to 512"),
        ((1, 1, 2, 512), 2, 2, None),
        ((1, 1, 255, 257), 255, 255, "below 65535"),
        ((1, 1, 217, 302), 217, 217, None),
        ((129, 1, 2, 15), 2, 2, "a batch of at most 128"),
        ((128, 1, 2, 15), 2, 2, None),
        ((129, 1, 2, 16), 2, 2, None),
        ((1, 1, 130, 2), 130, 2, "at most 64 times smaller"),
        ((1, 1, 65, 2), 65, 1, "at most 64 times smaller"),
        ((1, 1, 64, 2), 64, 1, None),
        ((1, 1, 256, 2), 256, 256, None),
        ((1, 1, 4, 2), 4, -2, "num_key_value_heads is -2"),
    ],
)
def test_limits(shape: tuple[int, ...], heads: int, kv_heads: int, message: str | None) -> None:
    """The first value beyond, and the last that is taken."""
    q, kv = torch.zeros(shape), torch.zeros(*shape[:2], abs(kv_heads), shape[3])
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        torch.ops.npu.npu_prompt_flash_attention(
            q, kv, kv, num_heads=heads, num_key_value_heads=kv_heads, input_layout="BSND"
        )
