"""GE operators of a mixture of experts; the arithmetic is that of ``qwen2_npu.ops``.

torchair feeds the product an empty tensor for every list that a call leaves out. Quantisation is refused: an input of
it that holds anything, when the node runs; an attribute, when the graph is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_npu import ops
from qwen2_npu.emulator.ge.operators.table import Ints, Tensor, operator


@operator("MoeGatingTopKSoftmax")
def gating_top_k_softmax(x: Tensor, finished: Tensor | None, *, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return ops.kernels["npu_moe_gating_top_k_softmax"](x, finished, k)


@operator("MoeInitRoutingV3", fixed={"expert_capacity": -1, "drop_pad_mode": 0, "quant_mode": -1})
def init_routing_v3(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    active_expert_range: Ints = (),
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ops.kernels["npu_moe_init_routing_v2"](
        x,
        expert_idx,
        active_num=active_num,
        expert_num=expert_num,
        expert_tokens_num_type=expert_tokens_num_type,
        expert_tokens_num_flag=expert_tokens_num_flag,
        active_expert_range=active_expert_range,
        row_idx_type=row_idx_type,
    )


_NOT_QUANTISED = {"dtype": -1, "act_type": 0}
_NOT_TRANSPOSED = {"transpose_weight": False, "transpose_x": False}


@operator("GroupedMatmul", fixed={**_NOT_QUANTISED, **_NOT_TRANSPOSED})
def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
    scale: list[Tensor],
    offset: list[Tensor],
    antiquant_scale: list[Tensor],
    antiquant_offset: list[Tensor],
    group_list: Tensor | None,
    *,
    split_item: int = 0,
    group_type: int = -1,
    group_list_type: int = 0,
    tuning_config: Ints = (0,),
) -> tuple[Tensor, ...]:
    quantisation = {
        "scale": scale,
        "offset": offset,
        "antiquant_scale": antiquant_scale,
        "antiquant_offset": antiquant_offset,
    }
    made = ops.kernels["npu_grouped_matmul"](
        x,
        weight,
        bias=_given(bias),
        group_list=group_list,
        split_item=split_item,
        group_type=group_type,
        group_list_type=group_list_type,
        **{name: _given(tensors) for name, tensors in quantisation.items()},
    )
    return tuple(made)


def _given(tensors: Sequence[Tensor | None]) -> list[Tensor] | None:
    """What a list holds beside the empty tensor that stands for nothing."""
    return [tensor for tensor in tensors if tensor is not None and tensor.numel()] or None


@operator("MoeFinalizeRouting")
def finalize_routing(
    expanded_x: Tensor,
    x1: Tensor,
    x2: Tensor | None,
    bias: Tensor,
    scales: Tensor,
    expanded_row_idx: Tensor,
    expanded_expert_idx: Tensor,
) -> Tensor:
    return ops.kernels["npu_moe_finalize_routing"](
        expanded_x, x1, x2, bias, scales, expanded_row_idx, expanded_expert_idx
    )


@operator("MoeFinalizeRoutingV2")
def finalize_routing_v2(
    expanded_x: Tensor,
    expanded_row_idx: Tensor,
    x1: Tensor | None,
    x2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expert_idx: Tensor | None,
    *,
    drop_pad_mode: int = 0,
    K: int = 1,  # noqa: N803 - the prototype's name; torchair writes it in lower case
    k: int = 1,
) -> Tensor:
    return ops.kernels["npu_moe_finalize_routing"](
        expanded_x, x1, x2, bias, scales, expanded_row_idx, expert_idx, drop_pad_mode, max(K, k)
    )
