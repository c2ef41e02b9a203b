"""A capture alone, over ordinary host memory that the test says is the device's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu.emulator.aclgraph.capture import HOST, Capture, CaptureError, Journal, extent
from qwen2_npu.emulator.aclgraph.captured import Computation, Group, Wait, Write
from qwen2_npu.emulator.eager.plan import Plan

Tensor = torch.Tensor
ADD_ = Plan.of(torch.ops.aten.add_.Tensor)
MUL = Plan.of(torch.ops.aten.mul.Tensor)


class Device:
    """Takes the tensors it is given for device memory."""

    def __init__(self, *tensors: Tensor) -> None:
        self.addresses = {tensor.untyped_storage().data_ptr(): index + 1 for index, tensor in enumerate(tensors)}

    def allocation(self, address: int) -> tuple[int, int]:
        serial = self.addresses.get(address, 0)
        return serial, 0 if serial else HOST


def capture_on(*tensors: Tensor) -> Capture:
    return Capture(Device(*tensors), torch.Generator)


def replay(capture: Capture) -> None:
    list(capture.graph.replay(lambda wait: True))


def test_memory_is_as_before_when_the_capture_ends() -> None:
    x = torch.ones(2)
    capture = capture_on(x)
    for _ in range(3):
        capture.operator(ADD_, Tensor.add_, [x, 1], {})
    assert x.tolist() == [4, 4]
    capture.end()
    assert x.tolist() == [1, 1]
    replay(capture)
    assert x.tolist() == [4, 4]


def test_python_numbers_and_single_host_numbers_stay_as_they_were() -> None:
    x, factor = torch.ones(2), torch.tensor(3.0)
    capture = capture_on(x)
    capture.operator(ADD_, Tensor.add_, [x, factor], {})
    capture.end()
    factor.fill_(100)
    replay(capture)
    assert x.tolist() == [4, 4]


def test_host_memory_is_refused_by_the_operators_name() -> None:
    x = torch.ones(2)
    with pytest.raises(CaptureError, match=r"aten.add_.Tensor with a CPU tensor of shape \(2,\) that is not pinned"):
        capture_on(x).operator(ADD_, Tensor.add_, [x, torch.ones(2)], {})


def test_copies_and_fills_are_recorded_and_taken_back() -> None:
    x, y = torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    capture = capture_on(x, y)
    capture.copy(y.data_ptr(), x.data_ptr(), 4)
    capture.fill(x.data_ptr(), 9, 4)
    capture.end()
    assert (x.tolist(), y.tolist()) == ([0, 1, 2, 3], [0, 0, 0, 0])
    replay(capture)
    assert (x.tolist(), y.tolist()) == ([9, 9, 9, 9], [0, 1, 2, 3])


@pytest.mark.parametrize("ours", [True, False])
def test_copies_of_host_memory_are_refused(ours: bool) -> None:
    x, host = torch.ones(4), torch.ones(4)
    target, source = (x, host) if ours else (host, x)
    with pytest.raises(CaptureError, match="copy of host memory that is not pinned"):
        capture_on(x).copy(target.data_ptr(), source.data_ptr(), 4)


def test_what_is_used_is_noted() -> None:
    x, flag = torch.ones(2), torch.zeros(1, dtype=torch.int64)
    capture = capture_on(x, flag)
    capture.operator(MUL, torch.mul, [x, 2], {})
    capture.wait(Wait(flag.data_ptr(), 1, 1))
    capture.write(Write(flag.data_ptr(), 0))
    assert dict(capture.graph.used()) == {1: x.data_ptr(), 2: flag.data_ptr()}


def test_groups_hold_what_is_recorded_between_their_ends() -> None:
    x = torch.ones(2)
    capture = capture_on(x)
    assert capture.begin_group()
    assert not capture.begin_group()
    capture.operator(MUL, torch.mul, [x, 2], {})
    group = capture.end_group()
    assert capture.end_group() is None
    capture.operator(MUL, torch.mul, [x, 3], {})
    assert [type(action) for action in capture.graph.actions] == [Group, Computation]
    assert group is capture.graph.actions[0]
    assert len(group.actions) == 1


def test_a_journal_undoes_the_last_write_first() -> None:
    x = torch.zeros(4, dtype=torch.uint8)
    journal = Journal()
    for start in (0, 1, 2):
        journal.save(x.data_ptr() + start, 2)
        x[start : start + 2] = start + 1
    journal.undo()
    assert x.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("make", "first", "count"),
    [
        (lambda x: x, 0, 24),
        (lambda x: x[1:], 3, 12),
        (lambda x: x[:, 1], 1, 16),
        (lambda x: x.t(), 0, 24),
        (lambda x: x[:0], 0, 0),
    ],
)
def test_extent_spans_the_first_to_the_last_element(make: Any, first: int, count: int) -> None:
    x = torch.zeros(2, 3)
    address, size = extent(make(x))
    assert size == count
    assert address == (x.data_ptr() + 4 * first if count else 0)
