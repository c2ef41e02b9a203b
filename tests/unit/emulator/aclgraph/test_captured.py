from __future__ import annotations

import torch

from qwen2_npu.emulator.aclgraph.captured import Computation, Copy, Fill, Graph, Group, Wait, Write

Tensor = torch.Tensor


def test_a_computation_puts_its_results_where_they_were() -> None:
    x, low, high = torch.tensor([3.0, 1.0]), torch.zeros(()), torch.zeros(())
    both = Computation(torch.aminmax, [x], {}, {0: low, 1: high})
    both()
    x.add_(1)
    both()
    assert (low.item(), high.item()) == (2, 4)


def test_random_numbers_are_drawn_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    out = torch.zeros(3)
    seeds = iter([1, 2])
    draw = Computation(
        torch.rand, [3], {"generator": generator}, {0: out}, lambda: torch.Generator().manual_seed(next(seeds))
    )
    draw()
    first = out.clone()
    draw()
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(out, torch.rand(3, generator=torch.Generator().manual_seed(2)))


def test_copies_and_fills_go_to_their_addresses() -> None:
    x, y = torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    Copy(y.data_ptr() + 1, x.data_ptr() + 2, 2)()
    assert y.tolist() == [0, 2, 3, 0]
    Fill(y.data_ptr(), 7, 2)()
    assert y.tolist() == [7, 7, 3, 0]


def test_a_replay_stops_where_a_value_is_missing_and_goes_on() -> None:
    done: list[str] = []
    there: list[bool] = [False]
    graph = Graph([lambda: done.append("before"), Wait(1, 1, 1), lambda: done.append("after")])
    replay = graph.replay(lambda wait: there[0])
    assert next(replay) == Wait(1, 1, 1)
    assert next(replay) == Wait(1, 1, 1)
    assert done == ["before"]
    there[0] = True
    assert next(replay, None) is None
    assert done == ["before", "after"]


def test_a_write_is_seen_at_its_address() -> None:
    flag = torch.ones(1, dtype=torch.int64)
    Write(flag.data_ptr(), 0)()
    assert flag.item() == 0


def test_a_group_can_be_replaced() -> None:
    done: list[int] = []
    group = Group([lambda: done.append(1)], {7: 70})
    graph = Graph([group], {5: 50})
    list(graph.replay(lambda wait: True))
    group.actions = [lambda: done.append(2)]
    list(graph.replay(lambda wait: True))
    assert done == [1, 2]
    assert dict(graph.used()) == {5: 50, 7: 70}
