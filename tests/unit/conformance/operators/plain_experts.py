"""The operators of a mixture of experts, in the manner of ``plain``."""

from __future__ import annotations

from typing import Any

import torch


def gating(fault: str, x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1) -> Any:
    rows, experts = x.shape[:-1].numel(), x.shape[-1]
    scores = x.reshape(rows, experts).float()
    exponentials = (scores - (0 if fault == "scores_not_shifted" else scores.amax(-1, keepdim=True))).exp()
    softmax = exponentials / exponentials.sum(-1, keepdim=True)
    if fault == "softmax_in_the_dtype":
        softmax = x.reshape(rows, experts).softmax(-1).float()
    values, chosen = x.new_zeros(rows, k, dtype=torch.float32), torch.zeros(rows, k, dtype=torch.int32)
    for row in range(rows):
        best = -1 if fault == "ties_to_the_last" else 1
        if fault == "smallest_first":
            order = sorted(range(experts), key=lambda expert: (float(softmax[row, expert]), expert))
        else:
            order = sorted(range(experts), key=lambda expert: (-float(softmax[row, expert]), best * expert))
        chosen[row] = torch.tensor(order[:k])
        values[row] = softmax[row, order[:k]]
        if finished is not None and bool(finished.reshape(-1)[row]) and fault != "finished_ignored":
            chosen[row] = experts - 1 if fault == "finished_get_the_last_expert" else experts
    if fault == "normalised_again":
        values = values / values.sum(-1, keepdim=True)
    numbers = torch.arange(rows * k, dtype=torch.int32)
    numbers = numbers.view(rows, k) if fault == "row_numbers_by_row" else numbers.view(k, rows).t().contiguous()
    shape = (*x.shape[:-1], k)
    return values.to(x.dtype).view(shape), chosen.view(shape), numbers.view(shape)


def init_routing(fault: str, x: torch.Tensor, expert_idx: torch.Tensor, expert_num: int, **t: Any) -> Any:
    k = expert_idx.shape[1]
    first, end = t.get("active_expert_range") or (0, expert_num)
    if fault == "range_ignored":
        first, end = 0, expert_num
    flat = expert_idx.t().reshape(-1) if fault == "by_column" else expert_idx.reshape(-1)
    by_expert = {
        expert: [copy for copy, its in enumerate(flat.tolist()) if its == expert] for expert in range(first, end)
    }
    if fault == "later_rows_first":
        by_expert = {expert: copies[::-1] for expert, copies in by_expert.items()}
    order = [copy for copies in by_expert.values() for copy in copies]
    places = [-1] * len(flat)
    for place, copy in enumerate(order):
        places[copy] = place
    if fault == "inactive_at_zero":
        places = [max(place, 0) for place in places]
    counts = torch.tensor([len(copies) for copies in by_expert.values()])
    if fault == "expert_zero_is_empty":
        counts[0] = 0
    ends = t["expert_tokens_num_type"] == (1 if fault == "ends_for_sizes" else 0)
    order += [0] * (len(flat) - len(order))
    rows = torch.tensor(order) % x.shape[0] if fault == "rows_by_column" else torch.tensor(order) // k
    scatter = (t.get("row_idx_type", 0) == 1) != (fault == "gather_for_scatter")
    index = torch.tensor(order if scatter else places, dtype=torch.int32)
    return x[rows], index, counts.cumsum(0) if ends else counts, torch.zeros(len(flat))


def grouped_matmul(fault: str, x: list[torch.Tensor], weight: list[torch.Tensor], **t: Any) -> Any:
    stacked = len(weight) == 1 and weight[0].dim() == 3
    weights = list(weight[0]) if stacked else weight
    biases = [0.0] * len(weights)
    if "bias" in t and fault != "bias_forgotten":
        biases = [bias.double() for bias in (t["bias"][0] if stacked else t["bias"])]
    if "group_list" in t:
        numbers = t["group_list"].tolist()
        sizes = numbers if t["group_list_type"] == 1 else [b - a for a, b in zip([0, *numbers], numbers, strict=False)]
        if fault == "empty_groups_skipped":
            sizes = [size for size in sizes if size] + [0] * sizes.count(0)
        if fault == "one_row_to_the_next_group":
            donor = next(index for index, size in enumerate(sizes) if size)
            sizes[donor] -= 1
            sizes[(donor + 1) % len(sizes)] += 1
        x = list(x[0].split(sizes))
    if fault == "first_weight_for_all":
        weights = [weights[0]] * len(weights)
    made = []
    for part, matrix, bias in zip(x, weights, biases, strict=True):
        wide = part.double() @ matrix.double()
        if fault == "product_rounded_before_bias":
            wide = wide.to(part.dtype).double()
        made.append((wide + bias).to(part.dtype))
    if fault == "reversed":
        made = made[::-1]
    return [torch.cat(made)] if t["split_item"] in (2, 3) else made


def finalize_routing(fault: str, **t: Any) -> Any:
    expanded, scales, index = t["expanded_permuted_rows"], t["scales"], t["expanded_src_to_dst_row"].long()
    k = 1 if scales is None else scales.shape[1]
    rows = len(index) // k
    by_row = (t["drop_pad_mode"] == 2) != (fault == "other_order")
    places = index.view(rows, k) if by_row else index.view(k, rows).t()
    weights = torch.ones(rows, k, 1) if scales is None or fault == "scales_ignored" else scales.unsqueeze(-1)
    weights = weights.to(expanded.dtype).double() if fault == "scales_rounded" else weights.double()
    parts = expanded[places].double()
    bias = 0.0
    if t["bias"] is not None and fault != "bias_forgotten":
        bias = t["bias"][t["export_for_source_row"].long()].double()
    parts = parts * weights + bias if fault == "bias_not_scaled" else (parts + bias) * weights
    if fault == "terms_rounded":
        parts = parts.to(expanded.dtype).double()
    out = parts[:, :-1].sum(1) if fault == "last_copy_dropped" else parts.sum(1)
    if fault == "sum_rounded_before_skips":
        out = out.to(expanded.dtype).double()
    for name in ("skip1", "skip2"):
        if t[name] is not None and fault != f"{name}_forgotten":
            out = out + t[name].double()
    return out.to(expanded.dtype)


PLAIN = {
    "npu_moe_gating_top_k_softmax": gating,
    "npu_moe_init_routing_v2": init_routing,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_finalize_routing": finalize_routing,
}
