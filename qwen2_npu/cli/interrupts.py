"""Ctrl-C that is not lost.

Python hands an interrupt on as an exception of whatever runs at that moment. Where that is a finaliser, a weakref
callback or the start of some C extensions, the exception is printed or dropped, and the program goes on as if nobody
had pressed a key: importing torch and transformers has many such places. So a command ends at once while it imports
them, and afterwards remembers that an interrupt came, for the places where it goes on.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_came = False


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Remember an interrupt that comes inside, beside the exception that Python makes of it.

    Nothing is changed where interrupts are ignored, as by nohup, or are somebody else's.
    """
    global _came
    _came = False
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """An interrupt inside ends the process, as a program's that knows of no signals: for what leaves nothing to do."""
    if signal.getsignal(signal.SIGINT) is not _remember or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _remember)


def check() -> None:
    """Before going on.

    Raises:
        KeyboardInterrupt: one came, whoever caught it.
    """
    if _came:
        raise KeyboardInterrupt


def came() -> bool:
    """Whether there was an interrupt since :func:`watched`."""
    return _came


def _remember(number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt
