"""Cells of recurrent networks, fused after their matrix products, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor


def _sum(first: Tensor, second: Tensor, *biases: Tensor | None) -> Tensor:
    total = first + second
    for bias in biases:
        total = total if bias is None else total + bias
    return total


def lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(hy, cy, workspace): gates (B, 4H) in the order input, forget, cell, output; the workspace has them activated."""
    gates = _sum(input_gates, hidden_gates, input_bias, hidden_bias)
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], -1)


def lstm_cell_backward(
    grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients by the gates (B, 4H), by cx, and by each bias (4H)."""
    i, f, g, o = workspace.chunk(4, -1)
    grad_hy = torch.zeros_like(cx) if grad_hy is None else grad_hy
    grad_cy = torch.zeros_like(cx) if grad_cy is None else grad_cy
    tanh = cy.tanh()
    through = grad_hy * o * (1 - tanh * tanh) + grad_cy
    gates = torch.cat(
        [
            through * g * i * (1 - i),
            through * cx * f * (1 - f),
            through * i * (1 - g * g),
            grad_hy * tanh * o * (1 - o),
        ],
        -1,
    )
    return gates, through * f, gates.sum(0) if has_bias else None


def gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(hy, workspace). Gates (B, 3H) in the order reset, update, new; the workspace is (B, 5H)."""
    ir, iz, inew = _sum(input_gates, torch.zeros_like(input_gates), input_bias).chunk(3, -1)
    hr, hz, hnew = _sum(hidden_gates, torch.zeros_like(hidden_gates), hidden_bias).chunk(3, -1)
    reset, update = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    new = (inew + reset * hnew).tanh()
    return new + update * (hx - new), torch.cat([reset, update, new, hx, hnew], -1)


TABLE: dict[str, Callable[..., Any]] = {
    "_thnn_fused_lstm_cell": lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": lstm_cell_backward,
    "_thnn_fused_gru_cell": gru_cell,
}
