"""The experts' tensors under two sets of names: one tensor each, as in files, or all of a layer stacked, as the stock
model of transformers 5 holds them in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_ALONE = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def one_by_one(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with a name for every tensor of every expert, as views."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        match = _STACKED.fullmatch(name)
        if match is None or not isinstance(tensor, torch.Tensor) or tensor.dim() != 3:
            found[name] = tensor
            continue
        scope, module = match.groups()
        for expert, matrix in enumerate(tensor):
            parts = ("gate_proj", "up_proj") if module == "gate_up_proj" else (module,)
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                found[f"{scope}.{expert}.{part}.weight"] = rows
    return found


def stacked(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with the experts of a layer in two tensors, (experts, 2 · columns, hidden) and (experts, hidden,
    columns), which are copies."""
    found: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in state.items():
        if (match := _ALONE.fullmatch(name)) is None:
            found[name] = tensor
        else:
            scope, expert, part = match.groups()
            layers.setdefault(scope, {}).setdefault(int(expert), {})[part] = tensor
    for scope, experts in layers.items():
        ordered = [experts[number] for number in sorted(experts)]
        gate_up = [torch.cat((parts["gate_proj"], parts["up_proj"])) for parts in ordered]
        found[f"{scope}.gate_up_proj"] = torch.stack(gate_up)
        found[f"{scope}.down_proj"] = torch.stack([parts["down_proj"] for parts in ordered])
    return found
