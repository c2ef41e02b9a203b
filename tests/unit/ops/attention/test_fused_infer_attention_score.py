"""npu_fused_infer_attention_score: it is the other two operators, with a log-sum-exp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2_npu.ops.attention import decode
from tests.unit.ops.attention.reference import (
    CAUSAL,
    HEADS,
    NQ,
    SCALE,
    D,
    assert_near,
    attention,
    log_sum_exp,
    random_qkv,
    to_layout,
)
from tests.unit.ops.support import compiled

npu = torch.ops.npu
FAR = 2147483647


def fia(q: Tensor, k: Tensor, v: Tensor, layout: str = "BNSD", **arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v = (to_layout(tensor, layout) for tensor in (q, k, v))
    # Literals: a global float would be a symbol under torch.compile, and cost a restart of the compilation.
    defaults = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.3, "input_layout": layout}
    return npu.npu_fused_infer_attention_score(q, k, v, **(defaults | arguments))


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
@pytest.mark.parametrize("q_len", [1, 6])
def test_layouts_and_the_empty_lse(layout: str, q_len: int) -> None:
    q, k, v = random_qkv(2, q_len, 9)
    out, lse = fia(q, k, v, layout)
    want = attention(q, k, v, torch.ones(q_len, 9, dtype=torch.bool))
    assert_near(out, to_layout(want, layout.split("_")[-1]))
    assert lse.shape == (0,)
    assert lse.dtype == torch.float32


def test_next_tokens_is_unbounded_by_default() -> None:
    q, k, v = random_qkv(2, 6, 9)
    drop = torch.zeros(6, 9, dtype=torch.bool)
    torch.testing.assert_close(fia(q, k, v, atten_mask=drop)[0], fia(q, k, v)[0])


@pytest.mark.parametrize("arguments", [{}, {"sparse_mode": 2}, {"sparse_mode": 3}, {"sparse_mode": 4, "pre_tokens": 3}])
def test_many_queries_are_the_prompt_operator(arguments: dict[str, Any]) -> None:
    q, k, v = random_qkv(2, 300, 310)
    if arguments:
        arguments = arguments | {"atten_mask": CAUSAL}
    shared = HEADS | arguments | {"input_layout": "BNSD", "next_tokens": 2, "actual_seq_lengths": [299, 4]}
    want = npu.npu_prompt_flash_attention(q, k, v, scale_value=SCALE, actual_seq_lengths_kv=[310, 5], **shared)
    out, _ = npu.npu_fused_infer_attention_score(q, k, v, scale=SCALE, actual_seq_lengths_kv=[310, 5], **shared)
    assert torch.equal(out, want)


@pytest.mark.parametrize("padding", [None, torch.tensor([3])])
def test_one_query_is_the_decode_operator(padding: Tensor | None) -> None:
    q, k, v = random_qkv(2, 1, 20)
    mask = torch.rand(2, 20) > 0.5
    shared = HEADS | {"input_layout": "BNSD", "atten_mask": mask, "kv_padding_size": padding}
    want = npu.npu_incre_flash_attention(q, k, v, scale_value=SCALE, actual_seq_lengths=[4, 9], **shared)
    # The query length and the band have no effect on one query.
    ignored = {"actual_seq_lengths": [1], "next_tokens": 0, "pre_tokens": 5}
    out, _ = npu.npu_fused_infer_attention_score(
        q, k, v, scale=SCALE, actual_seq_lengths_kv=[4, 9], **shared, **ignored
    )
    assert torch.equal(out, want)


def test_one_query_sees_all_in_bottom_right_causal_mode() -> None:
    q, k, v = random_qkv(2, 1, 20)
    ours, _ = fia(q, k, v, atten_mask=CAUSAL, sparse_mode=3)
    assert torch.equal(ours, fia(q, k, v)[0])


@pytest.mark.parametrize("q_len", [1, 6, 300])
@pytest.mark.parametrize("kv_lens", [None, [7], [4, 9], [9, 0]])
@pytest.mark.parametrize("masked", [False, True])
def test_lse(q_len: int, kv_lens: list[int] | None, masked: bool) -> None:
    q, k, v = random_qkv(2, q_len, 310 if q_len > 1 else 20)
    kv_len = k.shape[2]
    keep = (torch.arange(kv_len) < torch.tensor(kv_lens or [kv_len]).view(-1, 1, 1, 1)).expand(2, 1, q_len, -1)
    arguments: dict[str, Any] = {"actual_seq_lengths_kv": kv_lens, "softmax_lse_flag": True}
    if masked:
        drop = torch.rand(2, 1, q_len, kv_len, generator=torch.Generator().manual_seed(2)) > 0.5
        drop[..., 0] = False
        arguments |= {"atten_mask": drop, "sparse_mode": 1}
        keep = keep & ~drop
    out, lse = fia(q, k, v, **arguments)
    assert_near(out, attention(q, k, v, keep))
    want = log_sum_exp(q, k, keep).float()
    want = want.masked_fill(~keep.any(-1, keepdim=True), torch.inf)
    torch.testing.assert_close(lse, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([6, 2], None), ([3], [5]), ([0], None), ([0, 4], [9, 9]), (None, [0]), ([6, 6], [0, 0]), ([2, 6], [0, 7]),
        ([5, 1], [3, 8]), ([6, 5], [1, 3]),
    ],
    ids=str,
)  # fmt: skip
def test_lse_of_rows_past_their_length(q_lens: list[int] | None, kv_lens: list[int] | None, mode: int) -> None:
    """They have none, as rows that see no key."""
    q, k, v = random_qkv(2, 6, 9)
    rows, columns = torch.arange(6).view(1, 1, 6, 1), torch.arange(9)
    live_q, live_kv = (torch.tensor(given or [size]).view(-1, 1, 1, 1) for given, size in ((q_lens, 6), (kv_lens, 9)))
    drop = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(3)) > 0.5
    distance = columns - rows
    from_end = distance - (live_kv - live_q)
    seen = [distance > -99, ~drop, distance <= 0, from_end <= 0, (from_end <= 1) & (from_end >= -2)][mode]
    keep = (seen & (columns < live_kv) & (rows < live_q)).expand(2, 1, 6, 9)
    given: dict[str, Any] = {"atten_mask": [None, drop, CAUSAL, CAUSAL, CAUSAL][mode], "sparse_mode": mode}
    out, lse = fia(
        q, k, v, actual_seq_lengths=q_lens, actual_seq_lengths_kv=kv_lens, softmax_lse_flag=True, pre_tokens=2,
        next_tokens=1, **given,
    )  # fmt: skip
    want = log_sum_exp(q, k, keep).float().masked_fill(~keep.any(-1, keepdim=True), torch.inf)
    torch.testing.assert_close(lse, want.expand(2, NQ, 6, 1), rtol=1e-5, atol=1e-5)
    assert_near(out, attention(q, k, v, keep))


@pytest.mark.parametrize("readable", [True, False], ids=["", "known to the device alone"])
@pytest.mark.parametrize("padding", [None, 0, 3, 15])
@pytest.mark.parametrize("lengths", [[0], [7], [0, 0], [4, 9], [9, 0], [1, 9], [17, 20]], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_lse_of_a_window(
    lengths: list[int], padding: int | None, masked: bool, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without a window have none: +inf, and 0 in the output; where all of it is masked, that of the fill."""
    monkeypatch.setattr(decode, "is_readable", lambda tensor: readable)
    q, k, v = random_qkv(2, 1, 20)
    slots, live = torch.arange(20), torch.tensor(lengths).view(-1, 1, 1, 1)
    end = 20 - (padding or 0)
    keep = slots < live if padding is None else (slots < end) & (slots >= end - live) & (live <= end)
    keep = keep.expand(2, 1, 1, 20)
    drop = torch.rand(2, 20, generator=torch.Generator().manual_seed(4)) > 0.5
    drop[1] = True
    given = {"kv_padding_size": None if padding is None else torch.tensor([padding])}
    given |= {"atten_mask": drop} if masked else {}
    out, lse = fia(q, k, v, actual_seq_lengths_kv=lengths, softmax_lse_flag=True, **given)
    seen = keep & ~drop.view(2, 1, 1, 20) if masked else keep
    blind = keep.any(-1, keepdim=True) & ~seen.any(-1, keepdim=True)
    want = log_sum_exp(q, k, seen).float().masked_fill(blind, -1e12).masked_fill(~keep.any(-1, keepdim=True), torch.inf)
    torch.testing.assert_close(lse, want.expand(2, NQ, 1, 1), rtol=1e-5, atol=1e-5)
    mean = attention(torch.zeros_like(q), k, v, keep)
    assert_near(out, torch.where(blind, mean, attention(q, k, v, seen)))


def test_lse_of_a_fully_masked_decode_row_comes_from_the_fill() -> None:
    q, k, v = random_qkv(2, 1, 20)
    _, lse = fia(q, k, v, atten_mask=torch.ones(2, 20, dtype=torch.bool), softmax_lse_flag=True)
    torch.testing.assert_close(lse, torch.full((2, NQ, 1, 1), -1e12))


@pytest.mark.parametrize(
    ("q_len", "backend"),
    [
        (1, "aot_eager"),
        pytest.param(1, "inductor", marks=pytest.mark.slow),  # the kernel of npu_incre_flash_attention, see there
        (6, "aot_eager"),
        pytest.param(6, "inductor", marks=(pytest.mark.slow, pytest.mark.slow_in_ci)),
    ],
)
def test_one_graph_serves_every_length(q_len: int, backend: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        return fia(q, k, v, "BSND", actual_seq_lengths_kv=lengths)[0]

    fast, counter = compiled(function, backend)
    for step in range(10):
        q, k, v = random_qkv(2, q_len, 32)
        lengths = [12 + step, 3 + 2 * step]
        keep = (torch.arange(32) < torch.tensor(lengths).view(-1, 1, 1, 1)).expand(2, 1, q_len, -1)
        assert_near(fast(q, k, v, lengths), to_layout(attention(q, k, v, keep), "BSND"))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("q_len", "change", "message"),
    [
        (1, {"sparse_mode": 2}, "sparse_mode is 2; supported: 0, 1 or 3 for a single query"),
        (1, {"inner_precise": 4}, "inner_precise is 4"),
        (1, {"actual_seq_lengths_kv": [10]}, r"actual_seq_lengths_kv is \[10\]; supported: lengths from 0 to 9"),
        (6, {"kv_padding_size": torch.tensor([1])}, "kv_padding_size is .* None for more than one query"),
        (6, {"query_padding_size": torch.tensor([1])}, "query_padding_size is"),
        (6, {"actual_seq_lengths": [7]}, "actual_seq_lengths is .* from 0 to 6"),
        (6, {"key_rope": torch.zeros(1)}, "key_rope is"),
        (6, {"actual_shared_prefix_len": [3]}, r"actual_shared_prefix_len is \[3\]"),
        (6, {"antiquant_mode": 1}, "antiquant_mode is 1; supported: only the default 0"),
        (6, {"query": torch.zeros(2, 6, NQ, D).transpose(1, 2)}, "query is .* contiguous"),
    ],
)
def test_errors(q_len: int, change: dict[str, Any], message: str) -> None:
    q, k, v = random_qkv(2, q_len, 9)
    arguments = HEADS | {"query": q, "key": k, "value": v, "input_layout": "BNSD"}
    with pytest.raises(ValueError, match=f"npu::npu_fused_infer_attention_score: {message}"):
        npu.npu_fused_infer_attention_score(**(arguments | change))
