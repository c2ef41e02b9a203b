"""The chain of a mixture of experts, end to end and piece by piece; filters of sampling."""

from __future__ import annotations

import pytest
import torch

from tests.unit.emulator.eager.operators.harness import check, draw

npu = torch.ops.npu

ROWS, HIDDEN, EXPERTS, TOP = 5, 4, 3, 2


def test_gating():
    x = draw(ROWS, EXPERTS, grad=False)
    values, experts, rows = npu.npu_moe_gating_top_k_softmax(x.npu(), None, TOP)
    expected = torch.softmax(x.double(), -1).topk(TOP, -1)
    torch.testing.assert_close(values.cpu().double(), expected.values, rtol=1e-5, atol=1e-6)
    assert torch.equal(experts.cpu(), expected.indices.int())
    assert rows.tolist() == [[row + place * ROWS for place in range(TOP)] for row in range(ROWS)]


def test_finished_rows_get_an_expert_that_is_none():
    finished = torch.tensor([False, True, False, False, False])
    _, experts, _ = npu.npu_moe_gating_top_k_softmax(draw(ROWS, EXPERTS, grad=False).npu(), finished.npu(), TOP)
    assert experts[1].tolist() == [EXPERTS] * TOP


def test_init_routing_as_documented():
    x = torch.tensor([[0.1] * 4, [0.2] * 4, [0.3] * 4]).npu()
    row_idx = torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=torch.int32).npu()
    expert_idx = torch.tensor([[1, 2], [0, 1], [0, 2]], dtype=torch.int32).npu()
    rows, places, experts = npu.npu_moe_init_routing(x, row_idx, expert_idx, 3)
    assert experts.tolist() == [0, 0, 1, 1, 2, 2]
    assert [round(value, 1) for value in rows[:, 0].tolist()] == [0.2, 0.3, 0.1, 0.2, 0.1, 0.3]
    assert places.tolist() == [2, 0, 1, 4, 3, 5]
    assert npu.npu_moe_compute_expert_tokens(experts, 3).tolist() == [2, 4, 6]
    assert npu.npu_moe_compute_expert_tokens(experts, 2).tolist() == [2, 4]  # rows of no expert come last


def test_the_chain_is_the_dense_mixture():
    x, gate = draw(ROWS, HIDDEN, grad=False), draw(HIDDEN, EXPERTS, seed=1, grad=False)
    weights, bias = draw(EXPERTS, HIDDEN, 6, seed=2, grad=False), draw(EXPERTS, 6, seed=3, grad=False)
    skip = draw(ROWS, 6, seed=4, grad=False)
    scores = torch.softmax(x.double() @ gate.double(), -1).topk(TOP, -1)
    expected = skip.double().clone()
    for row in range(ROWS):
        for scale, expert in zip(scores.values[row], scores.indices[row], strict=True):
            expected[row] += scale * (x[row].double() @ weights[expert].double() + bias[expert].double())

    values, experts, row_idx = npu.npu_moe_gating_top_k_softmax((x @ gate).npu(), None, TOP)
    rows, places, ordered = npu.npu_moe_init_routing(x.npu(), row_idx, experts, ROWS)
    ends = npu.npu_moe_compute_expert_tokens(ordered, EXPERTS).long()
    products = npu.npu_grouped_matmul([rows], [weights.npu()], group_list=ends, split_item=3, group_type=0)
    found = npu.npu_moe_finalize_routing(products[0], skip.npu(), None, bias.npu(), values, places, experts)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-5)


def test_grouped_matmul_by_sizes_and_as_lists():
    x, weights = draw(5, 4, grad=False), draw(2, 4, 3, grad=False)
    expected = [x[:2] @ weights[0], x[2:] @ weights[1]]
    by_size = npu.npu_grouped_matmul(
        [x.npu()], [weights.npu()], group_list=torch.tensor([2, 3]).npu(), group_list_type=1, group_type=0
    )
    as_lists = npu.npu_grouped_matmul([x[:2].npu(), x[2:].npu()], list(weights.npu()), group_type=-1)
    for found in (by_size, as_lists):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)


def test_quantised_groups_are_refused():
    x = torch.ones(2, 2).npu()
    with pytest.raises(ValueError, match=r"npu_grouped_matmul: scale is .* only the default None"):
        npu.npu_grouped_matmul([x], [x], scale=[x], group_type=-1)


def test_top_k_top_p():
    def formula(logits, p, k):
        out = logits.clone()
        for row in range(logits.shape[0]):
            order = logits[row].argsort()
            kept = order[-int(k[row]) :]
            share = torch.softmax(logits[row][kept], -1).cumsum(-1)
            dropped = [order[: -int(k[row])], kept[:-1][share[:-1] <= 1 - p[row]]]
            out[row, torch.cat(dropped)] = float("-inf")
        return out

    arguments = torch.tensor([0.5, 0.9, 1.0]), torch.tensor([4, 7, 2], dtype=torch.int32)
    check(npu.npu_top_k_top_p, formula, draw(3, 8, grad=False), *arguments, meta=False)


def test_the_likeliest_token_is_kept_whatever_p_is():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    found = npu.npu_top_k_top_p(logits.npu(), torch.zeros(1).npu(), torch.tensor([2], dtype=torch.int32).npu())
    assert found.tolist() == [[float("-inf"), 3.0, float("-inf")]]
