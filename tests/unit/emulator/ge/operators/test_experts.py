"""What the operators of a mixture of experts refuse; what they compute is tested against the catalogue's goldens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu.emulator.ge.proto import UnsupportedGraphError
from tests.unit.emulator.ge.building import compute, ge

X, WEIGHT, SIZES = torch.randn(5, 8), torch.randn(3, 8, 4), torch.tensor([2, 0, 3])
NOTHING, SCALE = torch.empty(0), torch.ones(3, 4)


def product(x: Any, weight: Any, sizes: Any, nothing: Any, scale: Any = None, **options: Any) -> Any:
    lists = [[nothing]] * 2 if scale is None else [[nothing], [scale]]
    given = {"split_item": 2, "dtype": -1, "group_type": 0, "group_list_type": 1, **options}
    return ge.GroupedMatmul([x], [weight], *lists, [nothing], [nothing], [nothing], sizes, None, **given)


def test_empty_tensors_stand_for_lists_that_are_not_given() -> None:
    (found,) = compute(product, X, WEIGHT, SIZES, NOTHING)
    torch.testing.assert_close(found, torch.cat([X[:2] @ WEIGHT[0], X[2:] @ WEIGHT[2]]))


def test_a_scale_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"npu_grouped_matmul: scale is .* only the default None"):
        compute(product, X, WEIGHT, SIZES, NOTHING, SCALE)


@pytest.mark.parametrize("option", [{"transpose_weight": True}, {"act_type": 5}, {"dtype": 1}], ids=str)
def test_attributes_that_change_the_product_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedGraphError, match=rf"GroupedMatmul .* with {next(iter(option))}="):
        compute(lambda *given: product(*given, **option), X, WEIGHT, SIZES, NOTHING)


def test_padded_experts_are_refused() -> None:
    def routing(x: Any, experts: Any) -> Any:
        numbers = {"active_num": -1, "expert_capacity": 2, "expert_num": 4, "quant_mode": -1, "row_idx_type": 0}
        counts = {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "active_expert_range": [0, 4]}
        return ge.MoeInitRoutingV3(x, experts, None, None, drop_pad_mode=1, **numbers, **counts)

    with pytest.raises(UnsupportedGraphError, match=r"MoeInitRoutingV3 .* with expert_capacity=2 is not emulated"):
        compute(routing, X, torch.zeros(5, 2, dtype=torch.int32))
