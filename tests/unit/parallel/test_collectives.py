"""The three collectives on several ranks, and for which ranks a model is loaded."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qwen2_npu import Optimizations
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel import collectives, launch
from qwen2_npu.parallel.collectives import ALONE, FUSED_SIZES, Ranks, current
from qwen2_npu.parallel.sharding import WHOLE, Shard
from tests.unit.parallel.virtual import virtual_ranks
from tests.unit.small import small_config


# ---- current ---------------------------------------------------------------------------------------------------------
def test_a_script_of_a_user_joins_its_launcher_s_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the timeouts of the package's own commands, HCCL's too."""
    called: list[Any] = []
    double = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: False,
        init_process_group=lambda *a, **b: called.append((a, b)),
    )
    two = launch.Launch(0, 0, 2, None, "localhost", 29500)
    monkeypatch.setattr(collectives, "dist", double)
    monkeypatch.setattr(launch, "launched", lambda: two)
    monkeypatch.setattr(launch, "set_hccl_timeouts", called.append)
    collectives._join(torch.device("cpu"))
    assert called == [launch.timeout(), (("gloo",), {"timeout": timedelta(seconds=launch.timeout())})]


@pytest.mark.parametrize(
    ("found", "initialized", "available"),
    [
        (None, False, True),
        (launch.Launch(0, 0, 1, None, "localhost", 29500), False, True),
        (launch.Launch(0, 0, 2, None, "localhost", 29500), True, True),
        (launch.Launch(0, 0, 2, None, "localhost", 29500), False, False),
    ],
    ids=["no launcher", "one rank", "joined already", "no torch.distributed"],
)
def test_no_group_is_joined_where_there_is_none_to_join(
    found: Any, initialized: bool, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = SimpleNamespace(is_available=lambda: available, is_initialized=lambda: initialized)
    monkeypatch.setattr(collectives, "dist", double)
    monkeypatch.setattr(launch, "launched", lambda: found)
    collectives._join(torch.device("cpu"))


def test_whoever_says_which_rank_it_wants_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of another rank is looked at, or saved."""
    monkeypatch.setattr(collectives, "_join", lambda device: pytest.fail("joined"))
    assert current(2, 1).group is None
    assert current(1, None) == ALONE


@pytest.fixture
def world_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.distributed says on rank 1 of two."""
    answers = {"is_available": True, "is_initialized": True, "get_world_size": 2, "get_rank": 1}
    double = SimpleNamespace(
        group=SimpleNamespace(WORLD="the group"), **{name: lambda value=value: value for name, value in answers.items()}
    )
    monkeypatch.setattr(collectives, "dist", double)


@pytest.mark.parametrize(
    ("size", "rank", "shard"), [(None, None, WHOLE), (1, None, WHOLE), (1, 0, WHOLE), (4, 3, Shard(3, 4))]
)
def test_without_a_process_group(size: int | None, rank: int | None, shard: Shard) -> None:
    assert current(size, rank) == Ranks(shard)


@pytest.mark.parametrize("size", [2, 8])
def test_several_ranks_need_a_process_group(size: int) -> None:
    with pytest.raises(UnsupportedError, match=f"tp_size={size}, and there is no process group: .* pass tp_rank"):
        current(size, None)


@pytest.mark.parametrize(
    ("size", "rank", "shard", "joined"),
    [
        (None, None, Shard(1, 2), True),
        (2, None, Shard(1, 2), True),
        (2, 1, Shard(1, 2), True),
        (2, 0, Shard(0, 2), False),  # another rank's part can be looked at
        (4, 1, Shard(1, 4), False),
        (1, None, WHOLE, False),  # the whole model on every rank
    ],
)
@pytest.mark.usefixtures("world_of_two")
def test_in_a_process_group(size: int | None, rank: int | None, shard: Shard, joined: bool) -> None:
    assert current(size, rank) == Ranks(shard, "the group" if joined else None)


@pytest.mark.usefixtures("world_of_two")
def test_another_size_than_the_process_groups() -> None:
    with pytest.raises(UnsupportedError, match="tp_size=4, and the process group has 2"):
        current(4, None)


@pytest.mark.parametrize("size", ["2", 2.0, 0, -1])
def test_no_number_of_ranks(size: Any) -> None:
    with pytest.raises(UnsupportedError, match="tp_size="):
        current(size, 0)


def test_a_group_is_given_to_this_ranks_part_alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert current(None, None) == Ranks(WHOLE, dist.group.WORLD)
        assert current(2, 0).group is None
    finally:
        dist.destroy_process_group()


# ---- check -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", range(1, 9))
def test_sizes_of_the_fused_operator(size: int) -> None:
    config = small_config(num_attention_heads=840, num_key_value_heads=840, head_dim=2, intermediate_size=840)
    ranks = Ranks(Shard(0, size))
    ranks.check(config, Optimizations.all())
    if size in FUSED_SIZES:
        ranks.check(config, Optimizations.up_to("mm_all_reduce"))
    else:
        with pytest.raises(UnsupportedError, match=f"mm_all_reduce with tp_size={size}: it takes 2, 4, 8 ranks"):
            ranks.check(config, Optimizations.up_to("mm_all_reduce"))


# ---- the collectives -------------------------------------------------------------------------------------------------
def test_one_rank_talks_to_nobody() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert ALONE.all_reduce(tensor) is tensor
    assert ALONE.all_gather(tensor) is tensor
    assert ALONE.from_first(tensor) is tensor


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "from_first"])
def test_a_part_alone_computes_nothing(collective: str) -> None:
    with pytest.raises(AssertionError, match="join a process group"):
        getattr(Ranks(Shard(0, 2)), collective)(torch.ones(2))


def test_what_is_gathered_is_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """HCCL takes nothing else; gloo takes anything."""
    given: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_gather_single", lambda out, tensor, group: given.extend((out, tensor)))
    Ranks(Shard(0, 2), "the group").all_gather(torch.arange(12.0).view(3, 4)[:, :2], axis=1)
    assert all(tensor.is_contiguous() for tensor in given)
    assert [tuple(tensor.shape) for tensor in given] == [(6, 2), (3, 2)]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_values_on_all_ranks(count: int) -> None:
    whole = torch.arange(2 * 5 * 3 * count, dtype=torch.float32).view(2, 5, 3 * count)
    parts = whole.chunk(count, dim=-1)  # strided: not contiguous

    def talk(ranks: Ranks) -> tuple[torch.Tensor, ...]:
        part = parts[ranks.shard.rank]
        return (
            ranks.all_reduce(part.clone()),
            ranks.all_gather(part),
            ranks.all_gather(part.transpose(1, 2), axis=1),
            ranks.all_gather(part.movedim(-1, 0), axis=0),
            ranks.from_first(part.clone()),
        )

    with virtual_ranks(count) as run:
        results = run(talk)
    for total, last, middle, first, told in results:
        assert torch.equal(total, sum(parts))
        assert torch.equal(last, whole)
        assert torch.equal(middle, whole.transpose(1, 2))
        assert torch.equal(first, whole.movedim(-1, 0))
        assert torch.equal(told, parts[0])


def test_all_reduce_overwrites_its_argument_and_all_gather_does_not() -> None:
    def talk(ranks: Ranks) -> bool:
        tensor = torch.full((4,), float(ranks.shard.rank + 1))
        ranks.all_gather(tensor)
        kept = bool((tensor == ranks.shard.rank + 1).all())
        return kept and ranks.all_reduce(tensor) is tensor and bool((tensor == 3).all())

    with virtual_ranks(2) as run:
        assert run(talk) == [True, True]


def test_a_failing_rank_is_the_error_that_is_told() -> None:
    """Of the instrument: what a rank raises is not hidden by those that wait for it."""

    def fail(ranks: Ranks) -> None:
        raise LookupError(f"rank {ranks.shard.rank}")

    with virtual_ranks(2) as run, pytest.raises(LookupError, match="rank 0"):
        run(fail)
