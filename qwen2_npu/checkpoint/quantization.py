"""Which weights of a checkpoint are 8-bit integers: placeholder until the reader of checkpoints delivers its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantization:
    """What is quantised, and how.

    Attributes:
        scheme: "w8a16" or "w8a8".
        ignored: names of modules that are not.
    """

    scheme: str
    ignored: frozenset[str] = frozenset({"lm_head"})

    def covers(self, module: str) -> bool:
        """Whether the stock module of that name is quantised."""
        return module not in self.ignored


def quantization_of(config: Any) -> Quantization | None:
    """What ``config.quantization_config`` says; None where there is none."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    group = next(iter(said["config_groups"].values()))
    scheme = "w8a16" if group.get("input_activations") is None else "w8a8"
    return Quantization(scheme, frozenset(said.get("ignore", ())))
