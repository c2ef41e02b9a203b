"""Errors of stock_sharded. What it computes: tests/accuracy/parallel_ranks.py."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import Shard
from qwen2_npu.parallel.stock import stock_sharded
from tests.unit.small import small_config, small_stock


def test_one_rank_needs_no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model = small_stock()
    assert stock_sharded(model, Ranks()) is model


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # import raises ImportError
    for name in ("DS_ACCELERATOR", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "restored afterwards")
    group: Any = object()
    with pytest.raises(UnsupportedError, match=r'DeepSpeed, which is not installed: pip install -e "\.\[deepspeed\]"'):
        stock_sharded(small_stock(), Ranks(Shard(0, 2), group))


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, "2"), ({"LOCAL_WORLD_SIZE": "1"}, "1"), ({"LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "4"}, "4")],
    ids=["nobody says it", "torchrun", "DeepSpeed"],
)
def test_what_deepspeed_is_told(given: dict[str, str], size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCAL_SIZE is of this node: there may be several. The model comes back on the device that it was on."""
    for name in ("DS_ACCELERATOR", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # to be taken back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    told: dict[str, Any] = {}

    def init_inference(model: Any, **arguments: Any) -> Any:
        told.update(arguments, environment={name: os.environ[name] for name in ("DS_ACCELERATOR", "LOCAL_SIZE")})
        return SimpleNamespace(module=model)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(init_inference=init_inference))
    model, group = cast(Any, small_stock()).to(torch.bfloat16), cast(Any, object())
    assert stock_sharded(model, Ranks(Shard(1, 2), group)) is model
    assert (told["dtype"], told["tensor_parallel"]) == (torch.bfloat16, {"tp_size": 2})
    assert told["environment"] == {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": size}


def test_without_a_process_group() -> None:
    with pytest.raises(UnsupportedError, match="tp_size=2: AutoTP cuts the model for the ranks of the process group"):
        stock_sharded(small_stock(), Ranks(Shard(0, 2)))


def test_heads_that_cannot_be_cut() -> None:
    with pytest.raises(UnsupportedError, match="tp_size=3: 4 query heads and 2 kv heads"):
        stock_sharded(small_stock(), Ranks(Shard(0, 3)))
    shared = small_stock(small_config(num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(UnsupportedError, match="whole kv heads of its own, and the stock model has 2; use fewer ranks"):
        stock_sharded(shared, Ranks(Shard(0, 4)))
