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
        (lambda: nn.GRUCell(5, 6), (3, 5)),
    ],
    ids=["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "GRUCell with biases"],
)
def test_networks(make, shape):
    torch.manual_seed(0)
    network, x = make(), torch.randn(shape)
    expected = results(network, x)
    for one, other in zip(results(network.npu(), x.npu()), expected, strict=True):
        assert one.device.type == "npu"
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-6)
    with torch.inference_mode():  # elsewhere torch_npu takes a GRU's cell apart
        for one, other in zip(tree_leaves(network(x.npu())), expected, strict=False):
            torch.testing.assert_close(one.cpu(), other.detach(), rtol=1e-4, atol=1e-6)


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
