"""actual_seq_lengths: host lists of one length per batch row, or of a single length that all rows share.

Under torch.compile the entries are symbolic. Nothing here asks a symbolic length for its value, so one graph serves
all lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from qwen2_npu.ops.checks import invalid


def all_known(lengths: Sequence[int]) -> bool:
    """Whether every length is a number now, not a symbol of a trace."""
    return all(type(n) is int for n in lengths)


def check_lengths(op: str, argument: str, lengths: Sequence[int], batch: int, limit: int) -> Sequence[int]:
    """The lengths, as one entry where all rows are known to share it.

    Raises:
        ValueError: neither 1 nor B entries, or a length outside [0, limit].
    """
    if len(lengths) != 1 and len(lengths) != batch:
        raise invalid(op, argument, list(lengths), f"1 or {batch} entries (the batch size)")
    if all_known(lengths):
        for n in lengths:
            if n < 0 or n > limit:
                raise invalid(op, argument, list(lengths), f"lengths from 0 to {limit}, the sequence dimension")
        if len(set(lengths)) == 1:
            return lengths[:1]
    return lengths


def longest(lengths: Sequence[int]) -> int:
    return reduce(torch.sym_max, lengths)


def as_column(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int64 (B|1, 1, 1, 1) on `device`, without waiting for the device."""
    if all_known(lengths):
        column = torch.tensor(lengths, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    else:
        column = torch.stack([torch.full((), n, dtype=torch.int64, device=device) for n in lengths])
    return column.view(-1, 1, 1, 1)
