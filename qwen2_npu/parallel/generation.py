"""What a call of ``generate`` must have alike on all ranks, so that they make the same tokens and end together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from qwen2_npu.cache import FixedKVCache
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel.agreement import agree
from qwen2_npu.parallel.collectives import Ranks


def start(ranks: Ranks, call: Mapping[str, Any], device: torch.device) -> None:
    """Make one call of what every rank calls: the same arguments, and the random numbers of rank 0.

    The logits are the same bits on every rank (``Ranks.all_gather``), so equal random numbers sample equal tokens.

    Args:
        call: the arguments of ``generate`` by name.

    Raises:
        UnsupportedError: the ranks were given different arguments.
    """
    if ranks.size == 1:
        return
    agree({name: _described(value) for name, value in call.items() if name not in LOCAL}, way_out=WAY_OUT)
    # Of the device that samples; on rank 0 nothing changes.
    module: Any = torch if device.type == "cpu" else getattr(torch, device.type)
    state = module.get_rng_state()
    module.set_rng_state(ranks.from_first(state.to(device)).cpu())


def check(ranks: Ranks, configuration: Any) -> None:
    """Refuse what would let the ranks end apart.

    Args:
        configuration: the GenerationConfig that ``generate`` has settled on, wherever its values are from.

    Raises:
        UnsupportedError: a limit of time.
    """
    limit = getattr(configuration, "max_time", None)
    if ranks.size > 1 and limit is not None:
        raise UnsupportedError(
            f"max_time={limit!r}: each of the {ranks.size} ranks would stop by its own clock; use max_new_tokens"
        )


LOCAL = ("streamer", "synced_gpus")
"""Arguments that a rank may have for itself: one shows the text."""

WAY_OUT = "give generate() the same on every rank"


def _described(value: Any) -> str:
    """A short text that differs where ``value`` does; of what is no plain value, its type."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return (
            f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)} {hashlib.sha256(content).hexdigest()[:8]}"
        )
    if isinstance(value, FixedKVCache):  # it grows where it must, which all ranks must see alike
        padding = None if value.padding is None else _described(value.padding)
        return f"{value.shape.capacity} slots, {value.seen_tokens} seen, {value.lengths}, {padding}"
    if hasattr(value, "to_diff_dict"):  # a GenerationConfig
        return str(sorted(value.to_diff_dict().items(), key=str))
    if isinstance(value, (list, tuple)):  # of criteria, too, whose repr() is an address in this process
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_described(name)}: {_described(each)}' for name, each in value.items())}}}"
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
