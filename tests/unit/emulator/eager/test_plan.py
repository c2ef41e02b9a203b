"""What is read from schemas."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.eager.plan import Plan

aten = torch.ops.aten


def test_tensors_lists_and_fresh_results():
    plan = Plan.of(aten.where.self)
    assert (plan.tensors, plan.lists, plan.written, plan.returns) == ((0, 1, 2), (), (), (None,))
    assert Plan.of(aten.cat.default).lists == (0,)
    assert Plan.of(aten.index.Tensor).lists == (1,)
    assert Plan.of(aten.native_layer_norm.default).tensors == (0, 2, 3)


def test_what_is_written_and_handed_back():
    assert Plan.of(aten.add_.Tensor).returns == (0,)
    assert not Plan.of(aten.add_.Tensor).resizes
    plan = Plan.of(aten.sort.values)
    assert (plan.written, plan.returns, plan.resizes) == ((3, 4), (3, 4), True)
    assert Plan.of(aten._foreach_add_.Scalar).written == (0,)
    assert Plan.of(aten._foreach_add_.Scalar).returns == ()
    plan = Plan.of(aten.native_batch_norm.out)
    assert plan.returns == tuple(plan.names.index(name) for name in ("out", "save_mean", "save_invstd"))


def test_views():
    assert Plan.of(aten.unsqueeze.default).views
    assert Plan.of(aten.contiguous.default).views
    assert not Plan.of(aten.mm.default).views


def test_devices_generators_and_hidden_draws():
    assert Plan.of(aten.arange.default).device_at == 3
    assert Plan.of(aten.normal_.default).generator_at == 3
    assert not Plan.of(aten.normal_.default).seeded
    assert Plan.of(aten.randperm.default).seeded
    assert not Plan.of(aten.mm.default).seeded
