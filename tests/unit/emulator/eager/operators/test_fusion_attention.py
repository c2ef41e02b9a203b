"""npu_fusion_attention and F.scaled_dot_product_attention against numpy in float64, gradients against PyTorch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_npu

from qwen2_npu.emulator.eager.operators import fusion_attention
from tests.unit.emulator.eager.operators.harness import draw

npu = torch.ops.npu

B, N, GROUPS, SQ, SKV, D = 2, 4, 2, 5, 7, 8
SCALE = D**-0.5
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def reference(q, k, v, hidden=None, pse=None, scale=SCALE, sink=None):
    """Attention of (N, Sq, D) by (Nkv, Skv, D) in float64; ``hidden`` is True where a key is dropped."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    largest, total = np.zeros(q.shape[:2]), np.zeros(q.shape[:2])
    for head in range(q.shape[0]):
        kv = head // (q.shape[0] // k.shape[0])
        scores = q[head] @ k[kv].T
        if pse is not None:
            scores = scores + pse[head]
        scores = scores * scale
        if hidden is not None:
            scores = np.where(hidden, -np.inf, scores)
        for row, values in enumerate(scores):
            logits = values if sink is None else np.append(values, sink[head])
            if np.isneginf(logits).all():
                continue
            largest[head, row] = logits.max()
            weights = np.exp(values - largest[head, row])
            total[head, row] = np.exp(logits - largest[head, row]).sum()
            out[head, row] = weights @ v[kv] / total[head, row]
    return out, largest, total


def arranged(x, layout):
    """(B, N, S, D) in another layout."""
    orders = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3), "BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3)}
    moved = x.permute(*orders[layout])
    return moved.flatten(2) if layout.endswith("H") else moved


def inputs(sq=SQ, skv=SKV, dtype=torch.float32):
    return (
        draw(B, N, sq, D, dtype=dtype),
        draw(B, GROUPS, skv, D, dtype=dtype),
        draw(B, GROUPS, skv, D, seed=1, dtype=dtype),
    )


def expect(found, q, k, v, layout="BNSD", hidden=None, tolerance=1e-5, **more: Any):
    rows = [reference(q[b], k[b], v[b], None if hidden is None else hidden[b], **more) for b in range(B)]
    out = arranged(torch.from_numpy(np.stack([row[0] for row in rows])), layout)
    torch.testing.assert_close(found[0].cpu().double(), out, rtol=tolerance, atol=tolerance)
    for place in (1, 2):
        statistic = torch.from_numpy(np.stack([row[place] for row in rows])).unsqueeze(-1).expand(B, N, -1, 8)
        torch.testing.assert_close(found[place].cpu().double(), statistic, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, D), (torch.bfloat16, D), (torch.float32, D // 2)])
def test_layouts(layout, dtype, width):
    """Values may be narrower than keys."""
    q, k, v = inputs(dtype=dtype)
    v = v[..., :width]
    mask = torch.rand(B, 1, SQ, SKV, generator=torch.Generator().manual_seed(5)) < 0.3
    found = torch_npu.npu_fusion_attention(
        *(arranged(x, layout).detach().npu() for x in (q, k, v)), N, layout, atten_mask=mask.npu(), scale=SCALE
    )
    expect(found, q, k, v, layout, mask[:, 0].numpy(), 1e-5 if dtype is torch.float32 else 2**-7)


ROW, COLUMN = np.arange(SQ)[:, None], np.arange(SKV)[None, :]
END = SKV - SQ
MODES = {
    "no mask": ({"next_tockens": 0}, np.zeros((SQ, SKV), bool)),
    "0, full mask": ({"atten_mask": TRIANGLE[:SQ, :SKV]}, COLUMN > ROW),
    "0, band": (
        {"atten_mask": TRIANGLE[:SQ, :SKV] & False, "pre_tockens": 2, "next_tockens": 1},
        (COLUMN > ROW + 1) | (COLUMN < ROW - 2),
    ),
    "1": ({"atten_mask": TRIANGLE[:SQ, :SKV], "sparse_mode": 1, "pre_tockens": 0}, COLUMN > ROW),
    "2": ({"atten_mask": TRIANGLE, "sparse_mode": 2}, COLUMN > ROW),
    "3": ({"atten_mask": TRIANGLE, "sparse_mode": 3}, COLUMN > ROW + END),
    "4": (
        {"atten_mask": TRIANGLE, "sparse_mode": 4, "pre_tockens": 3, "next_tockens": 1},
        (COLUMN > ROW + END + 1) | (COLUMN < ROW + END - 3),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_sparse_modes(mode):
    given, hidden = MODES[mode]
    q, k, v = inputs()
    given = {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    found = torch_npu.npu_fusion_attention(*(x.detach().npu() for x in (q, k, v)), N, "BNSD", scale=SCALE, **given)
    expect(found, q, k, v, hidden=[hidden] * B)


@pytest.mark.parametrize(
    "given", [*(given for given, _ in MODES.values()), {"pse": draw(1, N, SQ, SKV), "keep_prob": 0.5}]
)
def test_rows_computed_in_several_blocks_are_those_of_one(given, monkeypatch):
    """Of 256 query rows each, so that tests of few rows never see a second one."""
    given = {name: value.detach().npu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}

    def run():
        leaves = [x.detach().npu().requires_grad_() for x in inputs()]
        torch.npu.manual_seed(3)
        found = torch_npu.npu_fusion_attention(*leaves, N, "BNSD", scale=SCALE, **given)[:3]
        return *found, *torch.autograd.grad(found[0].square().sum(), leaves)

    whole = run()
    monkeypatch.setattr(fusion_attention, "BLOCK_ROWS", 2)
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_prefix():
    q, k, v = inputs()
    prefix = [3, 5]
    hidden = [(COLUMN > ROW + END) & (n <= COLUMN) for n in prefix]
    mask = torch.ones(3072, 2048, dtype=torch.bool).npu()
    found = torch_npu.npu_fusion_attention(
        *(x.detach().npu() for x in (q, k, v)), N, "BNSD", atten_mask=mask, scale=SCALE, sparse_mode=6, prefix=prefix
    )
    expect(found, q, k, v, hidden=hidden)


def test_rows_that_see_nothing_are_zero():
    q, k, v = inputs(sq=7, skv=5)
    found = torch_npu.npu_fusion_attention(
        *(x.detach().npu() for x in (q, k, v)), N, "BNSD", atten_mask=TRIANGLE.npu(), scale=SCALE, sparse_mode=3
    )
    assert found[0][:, :, :2].abs().sum() == 0
    assert found[0][:, :, 2:].abs().sum() > 0


def test_position_bias_is_added_before_the_scale():
    q, k, v = inputs()
    pse = draw(1, N, SQ, SKV, grad=False)
    found = torch_npu.npu_fusion_attention(
        *(x.detach().npu() for x in (q, k, v)), N, "BNSD", pse=pse.npu(), scale=SCALE
    )
    expect(found, q, k, v, pse=pse[0].double().numpy())


def test_position_bias_of_type_0_is_added_after_the_scale():
    (q, k, v), pse = inputs(), draw(1, N, SQ, SKV, grad=False)
    found = torch_npu.npu_fusion_attention_v2(
        *(x.detach().npu() for x in (q, k, v)), N, "BNSD", pse=pse.npu(), scale=SCALE, pse_type=0
    )
    expect(found, q, k, v, pse=pse[0].double().numpy() / SCALE)


def test_sinks():
    q, k, v = inputs()
    sink = draw(N, grad=False)
    found = torch_npu.npu_fusion_attention(
        *(x.detach().npu() for x in (q, k, v)), N, "BNSD", scale=SCALE, sink=sink.npu()
    )
    expect(found, q, k, v, sink=sink.double().numpy())


ENDS = [3, 3, 8], [4, 4, 10]
"""Three sequences, the second of them empty."""


@pytest.mark.parametrize("mode", [0, 2, 3, 7, 8])
def test_packed_sequences_and_their_gradient(mode):
    q, k, v = draw(8, N, D), draw(10, GROUPS, D), draw(10, GROUPS, D, seed=1)

    def run(attention):
        leaves = [x.detach().to(attention.device).requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        return [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    class Ours:
        device = "npu"

        def __call__(self, q, k, v):
            mask = None if mode == 0 else TRIANGLE.npu()
            return torch_npu.npu_fusion_attention(
                q, k, v, N, "TND", atten_mask=mask, scale=SCALE, sparse_mode=mode,
                actual_seq_qlen=ENDS[0], actual_seq_kvlen=ENDS[1], pre_tockens=2, next_tockens=1,
            )[0]  # fmt: skip

    class Theirs:
        device = "cpu"

        def __call__(self, q, k, v):
            pieces = []
            for (q0, q1), (k0, k1) in (((0, 3), (0, 4)), ((3, 8), (4, 10))):
                parts = [x[a:b].transpose(0, 1) for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1))]
                end, whole = (k1 - k0) - (q1 - q0), torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
                # Of mode 7 the last sequence has a band from its end, of mode 8 the first one.
                banded = whole.tril(end + 1).triu(end - 2)
                kept = {0: [None] * 2, 2: [whole.tril(0)] * 2, 3: [whole.tril(end)] * 2}
                kept |= {7: [whole.tril(end), banded], 8: [banded, whole.tril(0)]}
                keep = kept[mode][q0 > 0]
                out = F.scaled_dot_product_attention(*parts, attn_mask=keep, scale=SCALE, enable_gqa=True)
                pieces.append(out.transpose(0, 1))
            return torch.cat(pieces)

    for one, other in zip(run(Ours()), run(Theirs()), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


def gradients(function, tensors, device):
    leaves = [x.detach().to(device).requires_grad_() for x in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(device)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("version", ["", "_v2", "_v3"])
def test_gradients(version):
    tensors = inputs()
    attention = getattr(torch_npu, f"npu_fusion_attention{version}")
    found = gradients(
        lambda q, k, v: attention(q, k, v, N, "BNSD", atten_mask=TRIANGLE.npu(), scale=SCALE, sparse_mode=2)[0],
        tensors,
        "npu",
    )
    expected = gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True),
        tensors,
        "cpu",
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


def test_rope_parts_of_version_2():
    (q, k, v), q_rope, k_rope = inputs(), draw(B, N, SQ, 4, seed=2), draw(B, GROUPS, SKV, 4, seed=3)

    def ours(q, k, v, q_rope, k_rope):
        return torch_npu.npu_fusion_attention_v2(q, k, v, N, "BNSD", query_rope=q_rope, key_rope=k_rope, scale=SCALE)[0]

    def theirs(q, k, v, q_rope, k_rope):
        q, k = torch.cat([q, q_rope], -1), torch.cat([k, k_rope], -1)
        return F.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=True)

    tensors = q, k, v, q_rope, k_rope
    for one, other in zip(gradients(ours, tensors, "npu"), gradients(theirs, tensors, "cpu"), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_dropout_is_the_same_backward(layout):
    torch.npu.manual_seed(3)
    shape, ends = ((1, 1, 64, 8), None) if layout == "BNSD" else ((64, 1, 8), [24, 24, 64])
    q, k = (torch.zeros(shape, device="npu") for _ in range(2))
    v = torch.ones(shape, device="npu", requires_grad=True)
    out = torch_npu.npu_fusion_attention(
        q, k, v, 1, layout, keep_prob=0.5, actual_seq_qlen=ends, actual_seq_kvlen=ends
    )[0]
    assert abs(out.mean().item() - 1) < 0.1
    assert out.std().item() > 0.05
    by_value = torch.autograd.grad(out.sum(), v)[0]
    # With equal scores, the sum over rows of what was kept of each key is both.
    torch.testing.assert_close(by_value.sum(), out.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "causal", "boolean", "additive", "dropout in evaluation"])
def test_scaled_dot_product_attention(kind):
    tensors = [draw(2, 4, 6, 16, seed=seed) for seed in range(3)]
    keep = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    keep[..., 0] = True
    more = {
        "plain": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": keep},
        "additive": {"attn_mask": torch.where(keep, 0.5, -2.0)},
        "dropout in evaluation": {"dropout_p": 0.0, "scale": 0.3},
    }[kind]

    def attention(q, k, v):
        there = {name: x.to(q.device) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
        return F.scaled_dot_product_attention(q, k, v, **there)

    for one, other in zip(gradients(attention, tensors, "npu"), gradients(attention, tensors, "cpu"), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


def test_what_is_not_emulated_is_named():
    q = torch.ones(1, 1, 2, 8, device="npu")
    with pytest.raises(NotImplementedError, match="npu_fusion_attention: padding_mask is not emulated"):
        torch_npu.npu_fusion_attention(q, q, q, 1, "BNSD", padding_mask=q)
    with pytest.raises(ValueError, match="input_layout='NBSD'"):
        npu.npu_fusion_attention(q, q, q, 1, "NBSD")
