"""Listeners between the rule and the CPU."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.eager import tap


def test_the_last_listener_is_called_first_and_may_change_the_result():
    order = []

    def listener(name):
        def listen(plan, run, args, kwargs):
            order.append((name, plan.op._schema.name))
            return run(*args, **kwargs) * 2

        return listen

    x = torch.ones(2, device="npu")
    tap.listeners += [listener("first"), listener("second")]
    try:
        y = x + x
    finally:
        tap.listeners.clear()
    assert y.tolist() == [8, 8]
    assert order == [("second", "aten::add"), ("first", "aten::add")]
    assert (x + x).tolist() == [2, 2]


def test_fresh_results_are_told_of():
    told = []
    tap.stored.append(lambda computed, stored: told.append((computed.device.type, stored)))
    try:
        x = torch.ones(2, device="npu")
        y = x * 3
        y.add_(1)
        y.view(1, 2)
    finally:
        tap.stored.clear()
    assert [kind for kind, _ in told].count("cpu") == len(told)
    assert any(stored is y for _, stored in told)
