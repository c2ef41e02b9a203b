"""What a collective that cannot be computed raises, and the code HCCL gives it."""

from __future__ import annotations

from enum import IntEnum


class HcclResult(IntEnum):
    """HcclResult: the values that are given here."""

    SUCCESS = 0
    PARA = 1
    INTERNAL = 4
    NOT_SUPPORT = 5
    NOT_FOUND = 6
    UNAVAIL = 7
    TIMEOUT = 9
    REMOTE = 21


class CollectiveError(RuntimeError):
    """A collective failed.

    Args:
        code: what HCCL's function returns; torch_npu puts it, the rank and this message into the error it raises.
        message: names the collective, the rank, the group, and the way out.
    """

    def __init__(self, code: HcclResult, message: str) -> None:
        super().__init__(message)
        self.code = code
