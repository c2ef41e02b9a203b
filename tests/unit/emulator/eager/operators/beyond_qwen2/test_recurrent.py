"""Recurrent networks of torch.nn on the NPU against the CPU's, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def results(network, x):
    x = x.detach().clone().requires_grad_()
    y = network(x)
    total = sum(leaf.square().sum() for leaf in tree_leaves(y))
    return [*tree_leaves(y), *torch.autograd.grad(total, [x, *network.parameters()])]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LSTM(5, 6, 2, bidirectional=True, batch_first=True), (3, 4, 5)),
        (lambda: nn.GRU(5, 6, 2, bidirectional=True), (4, 3, 5)),
        (lambda: nn.RNN(5, 6), (4, 3, 5)),
        (lambda: nn.LSTMCell(5, 6), (3, 5)),
        (lambda: nn.GRUCell(5, 6, bias=False), (3, 5)),
    ],
    ids=["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell"],
)
def test_networks(make, shape):
    torch.manual_seed(0)
    network, x = make(), torch.randn(shape)
    expected = results(network, x)
    for one, other in zip(results(network.npu(), x.npu()), expected, strict=True):
        assert one.device.type == "npu"
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-6)


def test_packed_sequences():
    torch.manual_seed(0)
    network, x = nn.LSTM(5, 6), torch.randn(4, 3, 5)

    def run(x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]))
        return nn.utils.rnn.pad_packed_sequence(network(packed)[0])

    expected, lengths = run(x)
    network.npu()
    found, found_lengths = run(x.npu())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found_lengths, lengths)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_fused_cells_add_each_bias_where_the_formulas_have_it(kind, bias):
    """The reset gate of a GRU takes the hidden part with its bias."""
    cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[kind](5, 6, bias)
    x, *state = torch.randn(3, 5), *(torch.randn(3, 6) for _ in range(2 if kind == "lstm" else 1))
    wanted = cell(x, tuple(state) if kind == "lstm" else state[0])
    gates = x @ cell.weight_ih.T, state[0] @ cell.weight_hh.T
    biases = (cell.bias_ih, cell.bias_hh) if bias else (None, None)
    with torch.inference_mode():  # elsewhere torch_npu takes a GRU's cell apart
        arguments = [None if value is None else value.npu() for value in (*gates, state[-1], *biases)]
        found = getattr(torch.ops.aten, f"_thnn_fused_{kind}_cell")(*arguments)
    for one, other in zip(found, tree_leaves(wanted), strict=False):
        torch.testing.assert_close(one.cpu(), other.detach(), rtol=1e-5, atol=1e-6)
