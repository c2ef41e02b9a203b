"""A source of 8-bit weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Int8Source:
    """What a checkpoint with 8-bit weights gives, in memory."""

    where = "memory"

    def __init__(self, config: Any, state: dict[str, torch.Tensor], covers: Callable[[str], bool]) -> None:
        self.config, self.state, self.reads = config, {}, 0
        for name, tensor in state.items():
            if tensor.dim() == 2 and covers(name.removesuffix(".weight")):
                scale = (tensor.abs().amax(1, keepdim=True).double() / 127).to(tensor.dtype)
                self.state[name] = (tensor.double() / scale.double()).round().clamp(-127, 127).to(torch.int8)
                self.state[f"{name}_scale"] = scale
            else:
                self.state[name] = tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def stored_dtype(self) -> torch.dtype:
        return self.state["model.norm.weight"].dtype

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        self.reads += 1
        return {name: self.state[name] for name in names}
