"""What one eager step asks of a device, counted instead of timed: operator launches, and KV read by the attention.

In single-operator mode the host launches every operator, and at small batches a step takes as long as that. Counts are
the same on every machine, so they gate what a clock on this one cannot.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2_npu.conformance.accuracy.intermediates import npu_operator

NO_LAUNCH = frozenset(
    f"aten.{name}"
    for name in (
        "detach", "empty", "empty_strided", "empty_like", "new_empty", "_unsafe_view", "_local_scalar_dense",
    )
)  # fmt: skip
"""Operators that allocate, reshape or read back and compute nothing; other views are told by their schema."""


@dataclass
class Counts:
    """Of one forward pass.

    Attributes:
        launches: operator -> calls that reach the device.
        kv_tokens: tokens of k and v that the incremental attention was told to read, over layers and rows.
    """

    launches: Counter[str] = field(default_factory=Counter)
    kv_tokens: int = 0

    @property
    def total(self) -> int:
        return self.launches.total()

    def difference(self, expected: Counts) -> str:
        """``operator: found, expected`` for all that differ; empty where nothing does."""
        names = sorted({*self.launches, *expected.launches})
        differing = [
            f"{name}: {self.launches[name]}, {expected.launches[name]} expected"
            for name in names
            if self.launches[name] != expected.launches[name]
        ]
        if self.kv_tokens != expected.kv_tokens:
            differing.append(f"KV tokens read: {self.kv_tokens}, {expected.kv_tokens} expected")
        return "; ".join(differing)


class Counting:
    """Within it, every operator call is counted. The npu operators count as one each, whatever computes them here."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._inside = False
        self._modes = (_NpuOperators(self), _OtherOperators(self))

    def __enter__(self) -> Counting:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def npu_operator(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        self.counts.launches[f"npu.{name}"] += 1
        if name == "npu_incre_flash_attention":
            self.counts.kv_tokens += _tokens_read(args[1], kwargs.get("actual_seq_lengths"))
        self._inside = True
        try:
            return func(*args, **kwargs)
        finally:
            self._inside = False

    def other_operator(self, func: Any) -> None:
        name = str(func).rsplit(".", 1)[0]
        if not self._inside and not _is_view(func) and name not in NO_LAUNCH:
            self.counts.launches[name] += 1


class _NpuOperators(TorchFunctionMode):
    """Sees ``torch.ops.npu`` calls before they are taken apart into what computes them on a CPU."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = npu_operator(func)
        if name is None:
            return func(*args, **(kwargs or {}))
        return self.counting.npu_operator(name, func, args, kwargs or {})


class _OtherOperators(TorchDispatchMode):
    """Sees what everything else is taken apart into."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counting.other_operator(func)
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """A view aliases an input without writing it."""
    returned = [result.alias_info for result in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _tokens_read(key: torch.Tensor, lengths: list[int] | None) -> int:
    """``key`` (B, C, K, D). Without lengths the whole capacity is read; one length is every row's."""
    batch, capacity = key.shape[0], key.shape[1]
    if lengths is None:
        return batch * capacity
    return sum(lengths) if len(lengths) == batch else batch * lengths[0]


def count_step(model: Any, *, batch: int, prompt: int, phase: str) -> Counts:
    """The counts of one prefill, or of the decode step after it.

    Args:
        phase: "prefill" or "decode".
    """
    tokens = torch.ones(batch, prompt, dtype=torch.int64, device=model.device)
    cache = model.allocate_cache(batch, prompt + 1)
    counting = Counting()
    with torch.no_grad():
        if phase == "decode":
            model(tokens, past_key_values=cache, logits_to_keep=1)
            tokens = tokens[:, :1]
        else:
            model(tokens, past_key_values=model.allocate_cache(batch, prompt + 1))  # what is built once is built
        with counting:
            model(tokens, past_key_values=cache, logits_to_keep=1)
    return counting.counts
