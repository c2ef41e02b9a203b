"""A comparison of a model that several ranks share: rank 0 compares, and tells the others what to compute with it.

The stock model and its float64 self are on rank 0 alone, and so are all decisions. The other ranks hold their parts of
the optimised model and nothing else. Before rank 0 calls that model it leaves an order in the store of the ranks: which
function, and with which tokens. The others make the same call, in whose collectives they meet. In between they look for
the next order: however long rank 0 computes by itself, no collective waits for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qwen2_npu.conformance.accuracy import locate_error, teacher_forcing, text
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.locate_error import BuildModel
from qwen2_npu.graph import compile_model
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel import launch
from qwen2_npu.parallel.launch import RankGroup

POLL = 0.02
"""Seconds between two looks for an order."""

BUILD, END = "build", "end"
"""Orders to build the model with other switches, and to stop."""

CALLS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (compile_model, teacher_forcing.run, locate_error.captures, text.token_losses, text.greedy)
}
"""The other orders: name -> what is called with the model that was built last."""


def rank_count() -> int:
    """How many ranks share the optimised model."""
    group = launch.current()
    return 1 if group is None else group.world_size


def ranks_of_host() -> int:
    """How many of them are on this host; all where the launcher does not say it."""
    found = launch.launched()
    return min((found and found.local_size) or rank_count(), rank_count())


class Orders:
    """What rank 0 of ``group`` tells the others, one after the other, as JSON in the store.

    Every rank makes one object for each comparison.
    """

    def __init__(self, group: RankGroup) -> None:
        self.size = group.world_size
        self._store = group.store
        self._scope = f"orders/{group.store.add(f'comparisons/{group.rank}', 1)}"
        self._count = 0

    @classmethod
    def of_ranks(cls) -> Orders | None:
        """Those of the ranks that this process belongs to; None where it is alone."""
        group = launch.current()
        return None if group is None or group.world_size == 1 else cls(group)

    def tell(self, what: str, **arguments: Any) -> None:
        """Rank 0: leave an order. Arguments are plain values, batches, and arrays of tokens."""
        self._store.set(f"{self._scope}/{self._count}", json.dumps([what, arguments], default=_to_json))
        self._count += 1

    def next(self) -> tuple[str, dict[str, Any]]:
        """Other ranks: the next order, however long it takes. Where rank 0 fails, ``parallel.monitor`` ends the
        process."""
        key = f"{self._scope}/{self._count}"
        while not self._store.check([key]):
            time.sleep(POLL)
        self._count += 1
        what, arguments = json.loads(self._store.get(key), object_hook=_from_json)
        return what, arguments

    def leading(self, build: BuildModel) -> BuildModel:
        """Rank 0: ``build``, which the others do as well."""

        def built(optimizations: Optimizations) -> Any:
            self.tell(BUILD, steps=optimizations.names())
            return build(optimizations)

        return built


def follow(orders: Orders, build: BuildModel) -> bool:
    """Do what rank 0 says until it ends the comparison.

    Args:
        build: makes this rank's part of the model.

    Returns:
        Whether the comparison passed.
    """
    model: Any = None
    while True:
        what, arguments = orders.next()
        if what == END:
            return bool(arguments["passed"])
        if what == BUILD:
            model = None  # there is memory for one
            model = build(Optimizations.of(arguments["steps"]))
        else:
            CALLS[what](model, **arguments)


def _to_json(value: Any) -> dict[str, Any]:
    if isinstance(value, Batch):
        return {"input_ids": value.input_ids.tolist(), "attention_mask": value.attention_mask.tolist()}
    assert isinstance(value, np.ndarray), f"an order cannot hold a {type(value).__name__}"
    return {"tokens": value.tolist()}


def _from_json(value: dict[str, Any]) -> Any:
    if value.keys() == {"input_ids", "attention_mask"}:
        return Batch(torch.tensor(value["input_ids"]), torch.tensor(value["attention_mask"]))
    return np.asarray(value["tokens"], np.int64) if value.keys() == {"tokens"} else value
